"""Names, totals and targets of an objective, and the moving target of a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.losses import NoTokenLoss, Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model import latent_mim
from olmoearth_jax.train import targets
from olmoearth_jax.train.assemble import trainable_leaves
from olmoearth_jax.train.step import TrainProgram
from olmoearth_jax.train.targets import ema_update
from tests.engines.compare import model_of
from tests.train.steady import steady
from tools.goldens.dense_engine import dense_engine

PATCH = losses.build({"type": "patch_discrimination"})
MODALITY = losses.build({"type": "modality_patch_discrimination_vec"})
KOLEO = losses.build({"type": "KoLeo"})
PIXELS = losses.build({"type": "mae"})


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (
            Objective(PATCH, losses.InfoNCE(0.1, 0.1), regularizer=KOLEO, mae=PIXELS),
            "PatchDisc+KoLeo+MAE",
        ),
        (Objective(PATCH, kind="mae", regularizer=KOLEO, mae=PIXELS), "MAE+PatchDisc+KoLeo"),
        (Objective(NoTokenLoss(), kind="mae", mae=PIXELS), "MAE"),
        (
            Objective(PATCH, kind="galileo", token_loss_b=MODALITY),
            "PatchDisc+ModalityPatchDisc",
        ),
    ],
)
def test_the_total_is_named_after_its_terms(objective, name):
    assert objective.metric_name == name


def test_the_total_averages_views_and_groups():
    objective = Objective(PATCH, losses.InfoNCE(0.1, 0.1), regularizer=KOLEO, kind="galileo",
                          view_metrics=("a", "b"))  # fmt: skip
    terms = {
        "base": jnp.array([[1.0, 3.0], [5.0, 7.0]]),
        "regularizer": jnp.array([0.5, 1.5]),
        "contrastive": jnp.array([10.0, 20.0]),
    }
    total, aux = objective.total(terms)
    assert float(total) == pytest.approx(4.0 + 1.0 + 15.0)
    assert {k: float(v.mean()) for k, v in aux.items()} == {
        "base": 4.0, "contrastive": 15.0, "KoLeo": 1.0, "a": 2.0, "b": 6.0,
    }  # fmt: skip


def test_a_target_is_whole_only_where_it_has_to_be():
    deep = (("landsat", 1),)
    assert not Objective(PATCH, exits=(("landsat", 0),)).full_target
    assert Objective(PATCH, exits=deep).full_target
    assert Objective(PATCH, exits_b=deep, kind="galileo").deep
    assert Objective(PATCH, moving=True).full_target
    assert not Objective(NoTokenLoss(), kind="mae", exits=deep).full_target


def test_what_no_loss_reads_is_left_alone():
    model = model_of("mae", pixels=True)
    trained = trainable_leaves(model, False, Objective(NoTokenLoss(), kind="mae", mae=PIXELS))
    assert not any(jax.tree.leaves(trained["decoder"]))
    assert all(jax.tree.leaves(trained["reconstructor"]))
    assert not any(jax.tree.leaves(trained["encoder"]["project_and_aggregate"]))
    trained = trainable_leaves(model, True, Objective(PATCH))
    assert all(jax.tree.leaves(trained["decoder"]))
    assert not any(jax.tree.leaves(trained["reconstructor"]))


def _program(objective, **changes) -> TrainProgram:
    model, mesh = model_of(), make_mesh(devices=jax.devices()[:1])
    config, trained = steady(model, **changes), trainable_leaves(model, True, objective)
    engine = dense_engine(config, objective, mesh, 4)
    return TrainProgram(config, engine, mesh, trained, 10)


def test_a_target_drawn_anew_differs_in_its_patch_embeddings():
    copied = _program(Objective(PATCH)).init_state()
    anew = _program(Objective(PATCH), reinit_targets=True).init_state()
    assert jax.tree.structure(copied["target"]) == jax.tree.structure(anew["target"])
    kernels = [
        np.asarray(
            s["target"]["patch_embeddings"]["per_modality"]["landsat"]["0"]["proj"]["kernel"]
        )
        for s in (copied, anew)
    ]
    assert not np.any(kernels[0] == kernels[1])
    for a, b in zip(*(jax.tree.leaves(s["params"]) for s in (copied, anew)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_moving_target_follows_before_the_step_and_keeps_the_old_one():
    program = _program(Objective(PATCH, moving=True), ema_decay=[0.9, 1.0])
    state = program.init_state()
    state["target"] = jax.tree.map(jnp.zeros_like, state["target"])
    moved, decay = program._follow(state, 2)
    assert decay == pytest.approx(0.92)
    online = dict(latent_mim.flatten(state["params"]["encoder"]))
    for path, leaf in latent_mim.flatten(moved["target"]):
        np.testing.assert_allclose(leaf, 0.08 * online[path], rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state["target"]))
    assert set(online) == {path for path, _ in latent_mim.flatten(moved["target"])}


def test_a_resting_target_is_not_touched():
    program = _program(Objective(PATCH))
    state = program.init_state()
    assert program._follow(state, 1) == (state, None)


def test_mae_training_keeps_no_target():
    objective = Objective(NoTokenLoss(), kind="mae", mae=PIXELS)
    assert targets.start_of({"encoder": {"norm": np.ones(1)}}, objective) == {}


def test_a_target_parameter_needs_its_online_counterpart():
    with pytest.raises(ValueError, match="no online counterpart"):
        ema_update({"a": jnp.ones(1)}, {"b": jnp.ones(1)}, 0.5)
