"""Token-stream engine: visible tokens of many samples share one packed axis.

Every matrix product, norm and MLP runs on `[tokens, width]`; tokens are gathered into rows of a
few fixed lengths only around attention and the losses. Programs are keyed by capacity (a rung of
the ladder), never by grid or patch size, so samples of different shapes share one program.
"""

from olmoearth_jax.exports import exported

__getattr__, __dir__ = exported(
    __name__,
    {
        "engine": "Engine StreamEngine",
        "ladder": "build_ladder",
        "pack": "MicroBatch",
        "stream_shape": "Rung StreamSpec",
    },
)
