"""One optimiser step: pack groups into micro-steps, accumulate gradients, update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.masks import CODES
from olmoearth_jax.mesh import global_arrays, local_devices, rules_of, shardings
from olmoearth_jax.model import latent_mim
from olmoearth_jax.stream.engine import Engine, Group, Prepared
from olmoearth_jax.train import optimizer, targets
from olmoearth_jax.train.compiling import Programs, shapes_of
from olmoearth_jax.train.optimizer import learning_rate
from olmoearth_jax.train.targets import ema_decay_at, ema_update

State = dict[str, Any]
_MASK_NAMES = tuple(code.name for code in CODES)


@dataclasses.dataclass
class StepReport:
    """What one step tells the loop.

    Attributes:
      metrics: device scalars, to be fetched when metrics are flushed.
      host: counts of all processes; with several, looking at them waits for the device.
      bad_ids: samples of this step that were holes.
    """

    metrics: dict[str, jax.Array]
    host: Mapping[str, Any]
    bad_ids: list[str]


class SharedCounts(Mapping[str, Any]):
    """Counts of all processes, fetched when they are first looked at.

    Args:
      names: of the counts.
      sums: float32 [counts], the same on every device.
      more: values that need no device.
    """

    def __init__(self, names: Sequence[str], sums: jax.Array, more: Mapping[str, Any]):
        self._names, self._sums, self._more = names, sums, more

    @functools.cached_property
    def _found(self) -> dict[str, Any]:
        sums = np.asarray(self._sums).tolist()
        return _with_shares(dict(zip(self._names, sums, strict=True))) | dict(self._more)

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class TrainProgram:
    """Compiled training of a config's model on one mesh.

    One program per micro-step capacity (`engine`'s program keys) and one update program; the
    accumulated gradients of good micro-steps are averaged, bad ones are dropped whole.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        engine: Engine,
        mesh: Mesh,
        trainable: Any,
        last_step: int,
        on_compile: Callable[[str, float], None] | None = None,
        compiler_options: Mapping[str, Any] | None = None,
    ):
        """Args:
        config: its model, training module, seed and sharding rules are used.
        engine: turns groups of samples into losses.
        mesh: the devices.
        trainable: tree of bools like the parameters (see `assemble.trainable_leaves`).
        last_step: horizon of the learning rate and of the target's decay.
        on_compile: told the name of a program and the seconds it took to compile.
        compiler_options: XLA's options by name, beside those of XLA_FLAGS.
        """
        self.config, self.model, self.engine, self.mesh = config, config.model, engine, mesh
        self.last_step = last_step
        self.programs = Programs(on_compile, compiler_options)
        module = config.train_module
        self._trained = trainable
        self._optimizer = optimizer.adamw(module.optim_config, trainable, module.max_grad_norm)
        self._peak = optimizer.peak_rate(module.optim_config)
        self._shardings = shardings(
            self._shapes(), mesh, rules_of(config.fsdp_rules, mesh.shape["fsdp"])
        )
        # Sharded parameters keep their gradients apart, each sharded as it is. So do those on a
        # GPU, whose kernels do not take as many arguments as there are parameters.
        whole = (s.is_fully_replicated for s in jax.tree.leaves(self._shardings["params"]))
        self._flat = mesh.devices.flat[0].platform == "cpu" and all(whole)
        self._rng = jax.random.key(config.init_seed)

    @property
    def compile_count(self) -> int:
        """Programs compiled so far."""
        return self.programs.count

    @property
    def compiling(self) -> int:
        """Programs that a step waits for now."""
        return self.programs.awaited

    def _shapes(self) -> State:
        params = latent_mim.graph(self.model)[1]
        target = targets.start_of(params, self.engine.objective)
        opt_state = jax.eval_shape(self._optimizer.init, params)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        return {"params": params, "target": target, "opt_state": opt_state, "step": step}

    def abstract_state(self) -> State:
        """The state's shapes with this mesh's shardings, onto which checkpoints are restored."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self._shapes(),
            self._shardings,
        )

    def init_state(self) -> State:
        """Fresh parameters, their target, and an empty optimiser state."""
        return self.state_from(*self.initial())

    def initial(self) -> tuple[Any, Any]:
        """(parameters, target) before the first step."""
        seed, objective = self.config.init_seed, self.engine.objective
        params = latent_mim.initial_params(self.model, seed)
        if self.config.train_module.reinit_targets:
            return params, targets.drawn_anew(self.model, objective, seed)
        return params, targets.start_of(params, objective)

    def state_from(self, params: Any, target: Any = None) -> State:
        """A fresh state around given parameters (and target, by default a copy of theirs)."""
        target = targets.start_of(params, self.engine.objective) if target is None else target
        # Copies: the state is donated to every update, so no two leaves may share a buffer.
        target = jax.tree.map(np.array, target)
        put = functools.partial(jax.tree.map, jax.device_put)
        params = put(params, self._shardings["params"])
        init = jax.jit(self._optimizer.init, out_shardings=self._shardings["opt_state"])
        return {
            "params": params,
            "target": put(target, self._shardings["target"]),
            "opt_state": init(params),
            "step": jax.device_put(np.int32(0), self._shardings["step"]),
        }

    def step(
        self,
        state: State,
        groups: Sequence[Group],
        step: int,
        gate: Callable[[], None] = lambda: None,
    ) -> tuple[State, StepReport]:
        """Takes step number `step` (1-based) on the groups of one global batch.

        The state is donated: use the returned one. `gate` is called once, when everything is
        compiled and nothing of the state is consumed yet; if it raises, the state stays whole.
        """
        plan = self.config.train_module.scheduler
        lr = learning_rate(plan, self._peak, step, self.last_step)
        micro_steps = self.engine.prepare(groups)
        if self.config.compile.ahead and not self.programs:
            self._compile_ahead(state, groups, micro_steps)
        total = self._zeros(state, micro_steps[0])
        counts = counts_of(micro_steps, groups)
        update = self._update_program(state, total, counts)
        state, decay, total = self._accumulate(state, micro_steps, total, step, gate)
        more = {} if decay is None else {"train/ema_decay": decay}
        more["optim/LR (group 0)"] = lr
        if "epoch" in groups[0]:
            more["train/epoch"] = float(groups[0]["epoch"])
        bad = [name for m in micro_steps for name in m.bad_ids]
        if jax.process_count() == 1:
            state, metrics = update(state, total, np.float32(lr))
            return state, StepReport(metrics, _with_shares(counts) | more, bad)
        state, metrics, sums = update(state, total, np.float32(lr), self._rows(counts))
        return state, StepReport(metrics, SharedCounts(tuple(counts), sums, more), bad)

    def _rows(self, counts: dict[str, float]) -> jax.Array:
        """float32 [devices, counts] over all processes: what each has counted, in one row."""
        rows = np.zeros((len(local_devices(self.mesh)), len(counts)), np.float32)
        rows[0] = list(counts.values())
        return global_arrays(self.mesh, rows)

    def _update_program(self, state: State, total: Any, counts: dict[str, float]) -> Any:
        arguments = (state, total, np.float32(0))
        if jax.process_count() == 1:
            return self.programs.get("update", self._update, arguments, (0,))
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        # Trap: no arithmetic on arrays that span processes outside of the compiled programs of a
        # step. Every such operation is a program of its own on all devices. A step has hundreds
        # of counts, and as many small programs started beside the step's collectives made
        # processes with two CPU devices wait for one another for ever. So the counts are an
        # input of the update, which adds them up, and all else is done with what is fetched.
        def update(state, total, lr, rows):
            return *self._update(state, total, lr), jax.lax.with_sharding_constraint(
                rows.sum(0), everywhere
            )

        name = f"update of {len(counts)}"  # masks of other modalities make another program
        return self.programs.get(name, update, (*arguments, self._rows(counts)), (0,))

    def gradients(self, state: State, groups: Sequence[Group], step: int = 1):
        """(gradients, metrics) of a step without taking it; for parity checks."""
        micro_steps = self.engine.prepare(groups)
        total = self._zeros(state, micro_steps[0])
        _, _, total = self._accumulate(state, micro_steps, total, step, lambda: None)

        def mean(state, total):
            grads = jax.tree.map(lambda g: g / total["good"], total["grads"])
            return self._unpacked(grads, state["params"]), self._metrics(total)

        return jax.jit(mean)(state, total)

    def _packed(self, grads: Any) -> Any:
        """Gradients as one vector on a CPU, where a program that adds and checks one array
        instead of one per parameter compiles in half the time.
        """
        return ravel_pytree(grads)[0] if self._flat else grads

    def _unpacked(self, grads: Any, params: Any) -> Any:
        return ravel_pytree(params)[1](grads) if self._flat else grads

    def _accumulate(self, state, micro_steps, total, step, gate):
        """(state with its target moved, decay, sums) after all micro-steps of a step."""
        key = jax.random.fold_in(self._rng, step)
        programs = [self._program(micro_step, state, total, key) for micro_step in micro_steps]
        gate()
        state, decay = self._follow(state, step)
        for program, micro_step in zip(programs, micro_steps, strict=True):
            # Packed here, one by one: the devices are at work on the micro-step before.
            inputs = micro_step.inputs
            micro_step.release()
            total = program(state["params"], state["target"], total, inputs, key)
        return state, decay, total

    def _follow(self, state: State, step: int) -> tuple[State, float | None]:
        """Moves the target towards the online encoder, before the step's forward."""
        decay = ema_decay_at(step, self.last_step, self.config.train_module.ema_decay)
        if decay is None or not state["target"]:
            return state, None
        arguments = (state["target"], state["params"]["encoder"], np.float32(decay))
        out = self._shardings["target"]
        target = self.programs.get("target", ema_update, arguments, (), out)(*arguments)
        return {**state, "target": target}, decay

    def warm_up(self, prepared: Prepared, state: State) -> None:
        """Compiles the program of a micro-step without running it."""
        total = self._zeros(state, prepared)
        self._program(prepared, state, total, self._rng)

    def compile_all(self, state: State, groups: Sequence[Group]) -> None:
        """Compiles the programs of every capacity without running them.

        An engine whose programs are keyed by shape has no such list and compiles when it must.
        """
        planned = self._every_program(groups, spare=True)
        if planned:
            self._compile_together(state, groups, planned)

    def _compile_ahead(
        self, state: State, groups: Sequence[Group], micro_steps: Sequence[Prepared]
    ) -> None:
        """Compiles what a first step needs, and behind the training what others will need.

        Only what is rarer than all that was simulated waits until it is needed.
        """
        needed = {micro_step.key: micro_step for micro_step in micro_steps}
        others = [p for p in self._every_program(groups, spare=False) if p.key not in needed]
        self._compile_together(state, groups, list(needed.values()))
        # The state is given away by every update: what is compiled beside it must not hold it.
        shapes = self.abstract_state()
        total = shapes_of(self._zeros(state, micro_steps[0]))

        def job(prepared: Prepared) -> None:
            # Nor may it hold inputs, for which the devices may have no room beside the training.
            inputs = dataclasses.replace(prepared, pack=lambda: shapes_of(prepared.pack()))
            self._program(inputs, shapes, total, self._rng)

        self.programs.behind([functools.partial(job, prepared) for prepared in others])

    def _every_program(self, groups: Sequence[Group], spare: bool) -> list[Prepared]:
        every = getattr(self.engine, "every_program", None)
        return [] if every is None else list(every(groups, spare))

    def _compile_together(
        self, state: State, groups: Sequence[Group], planned: Sequence[Prepared]
    ) -> None:
        total = self._zeros(state, planned[0])  # made once, before there are several threads
        counts = counts_of(planned[:1], groups)
        self.programs.all(
            [functools.partial(self._program, p, state, total, self._rng) for p in planned],
            # Beside them: small, and needed as soon.
            lambda: self._update_program(state, total, counts),
        )

    def _zeros(self, state: State, prepared: Prepared):
        def shapes(params, target, inputs, key):
            _, aux = self.engine.loss(params, target, inputs, key, prepared.key)
            return jax.tree.map(lambda x: jnp.zeros((), jnp.float32), aux)

        if "zeros" not in self.programs:
            aux = jax.eval_shape(
                shapes, state["params"], state["target"], prepared.inputs, self._rng
            )

            def make():
                params = self._shapes()["params"]
                grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
                return {
                    "grads": self._packed(grads),
                    "aux": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), aux),
                    "loss": jnp.zeros((), jnp.float32),
                    "good": jnp.zeros((), jnp.float32),
                    "seen": jnp.zeros((), jnp.float32),
                }

            everywhere = NamedSharding(self.mesh, PartitionSpec())
            out = jax.tree.map(lambda _: everywhere, jax.eval_shape(make))
            if not self._flat:
                out["grads"] = self._shardings["params"]
            self._total_shardings = out
            self.programs["zeros"] = jax.jit(make, out_shardings=out)
        return self.programs["zeros"]()

    def _program(self, prepared: Prepared, state, total, key):
        program_key = prepared.key
        if (known := self.programs.find(program_key)) is not None:
            return known
        micro_step = self.micro_step(program_key)
        arguments = (state["params"], state["target"], total, prepared.inputs, key)
        return self.programs.get(program_key, micro_step, arguments, (2,), self._total_shardings)

    def micro_step(self, program_key: Any) -> Callable[..., Any]:
        """The function of a micro-step before it is compiled.

        It takes parameters, target, sums so far (donated), inputs and a random key, and gives
        the sums with this micro-step's.
        """

        def micro_step(params, target, total, inputs, key):
            def loss(params):
                value, aux = self.engine.loss(params, target, inputs, key, program_key)
                return value, jax.tree.map(lambda x: jnp.mean(x.astype(jnp.float32)), aux)

            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
            grads = self._packed(grads)
            norms = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
            good = jnp.isfinite(value) & jnp.isfinite(jnp.stack(norms).sum())
            # Selecting, not multiplying: 0 * NaN would still be NaN.
            add = functools.partial(jax.tree.map, lambda t, x: t + jnp.where(good, x, 0.0))
            return {
                "grads": add(total["grads"], grads),
                "aux": add(total["aux"], aux),
                "loss": add(total["loss"], value),
                "good": total["good"] + good,
                "seen": total["seen"] + 1.0,
            }

        return micro_step

    def close(self) -> None:
        """Compiles nothing more behind the training."""
        self.programs.close()

    def memory(self) -> list[str]:
        """A line per compiled program: what it needs of a device's memory, largest first."""
        return self.programs.memory()

    def _update(self, state: State, total, lr):
        good = total["good"]
        grads = jax.tree.map(lambda g: g / jnp.maximum(good, 1.0), total["grads"])
        grads = self._unpacked(grads, state["params"])

        def take(state):
            before = state["params"]
            norm = optax.tree.norm(
                jax.tree.map(lambda g, keep: g if keep else None, grads, self._trained)
            )
            updates, opt_state = self._optimizer.update(grads, state["opt_state"], before, rate=lr)
            params = optax.apply_updates(before, updates)
            moved = optax.tree.norm(jax.tree.map(jnp.subtract, params, before))
            return {**state, "params": params, "opt_state": opt_state}, (norm, moved)

        def skip(state):
            return state, (jnp.full((), jnp.nan, jnp.float32), jnp.zeros((), jnp.float32))

        new, (norm, moved) = jax.lax.cond(good > 0, take, skip, state)
        new["step"] = state["step"] + 1
        new = jax.lax.with_sharding_constraint(new, self._shardings)
        norms = {
            "optim/total grad norm": norm,
            "optim/update norm": moved,
            "optim/parameter norm": optax.tree.norm(new["params"]),
        }
        return new, {**self._metrics(total), **norms}

    def _metrics(self, total) -> dict[str, jax.Array]:
        good = total["good"]

        def mean(x):
            return jnp.where(good > 0, x / jnp.maximum(good, 1.0), jnp.nan)

        name = self.engine.objective.metric_name
        out = {
            "train/loss": mean(total["loss"]),
            f"train/{name}": mean(total["loss"]),
            "train/good_micro_steps": good,
            "train/dropped_micro_steps": total["seen"] - good,
        }
        for key, value in total["aux"].items():
            name = key if "/" in key else f"train/{key}"
            out["train/InfoNCE" if key == "contrastive" else name] = mean(value)
        return out


def counts_of(micro_steps: Sequence[Prepared], groups: Sequence[Group]) -> dict[str, float]:
    """This process's counts of a step: its masks' tokens, and the micro-steps' added up."""
    counts = _mask_counts(groups)
    for prepared in micro_steps:
        for name, value in prepared.host.items():
            counts[name] = counts.get(name, 0.0) + value
    return counts


def _with_shares(counts: dict[str, float]) -> dict[str, float]:
    """All processes' counts as they are reported: padding, and tokens per mask code, as shares."""
    out = dict(counts)
    real = out["encoded_tokens"] + out["decoded_tokens"]
    real += out.get("target_tokens", 0.0) + out.get("location_tokens", 0.0)
    out["padded_share"] = 1.0 - real / out.pop("stream_tokens")
    tokens = [name for name in out if name.startswith("masks/")]
    every = sum(out[name] for name in tokens) if tokens else 1.0
    return out | {name: out[name] / every for name in tokens}


def _mask_counts(groups: Sequence[Group]) -> dict[str, float]:
    """Tokens of a step per mask code and modality: {'masks/sentinel1/decoded': n, ...}."""
    counts: dict[str, float] = {}
    for group in groups:
        for view in ("mask_a", "mask_b"):
            for name, mask in group.get(view, {}).items():
                found = np.bincount(np.asarray(mask).reshape(-1), minlength=len(_MASK_NAMES))
                for code, n in zip(_MASK_NAMES, found, strict=True):
                    key = f"masks/{name}/{code}"
                    counts[key] = counts.get(key, 0.0) + float(n)
    return counts
