"""`python -m olmoearth_jax VERB`: the command `olmoearth` where it is not installed."""

from olmoearth_jax.commands import main

if __name__ == "__main__":
    main()
