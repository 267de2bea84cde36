"""The student's loss: what it reads, what it moves, which cells it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.losses.distillation import Distillation, cell_scores, drawn_cells

WIDE, SMALL = 6, 4


def inputs(seed=0, batch=3, cells=(2, 3)):
    rng = np.random.default_rng(seed)
    teacher = jnp.asarray(rng.normal(size=(batch, *cells, WIDE)), jnp.float32)
    student = jnp.asarray(rng.normal(size=(batch, *cells, SMALL)), jnp.float32)
    mats = {w: jnp.asarray(rng.normal(size=(w, WIDE)), jnp.float32) for w in (4, 2)}
    return teacher, student, {w: (lambda x, m=m: x @ m) for w, m in mats.items()}


def test_the_teacher_is_left_alone():
    teacher, student, back = inputs()
    loss = Distillation((2, 4))
    grads = jax.grad(lambda t, z: loss(t, z, back)[0], argnums=(0, 1))(teacher, student)
    assert not np.any(grads[0]) and np.all(np.abs(grads[1]).sum(-1) > 0)


def test_neither_scale_nor_order_of_the_cells_matters():
    teacher, student, back = inputs()
    loss = Distillation((4, 2))
    value, _ = loss(teacher, student, back)
    np.testing.assert_allclose(loss(teacher * 7, student, back)[0], value, rtol=1e-6)
    order = np.random.default_rng(1).permutation(18)
    cells, small = (x.reshape(18, -1)[order] for x in (teacher, student))
    np.testing.assert_allclose(loss(cells, small, back)[0], value, rtol=1e-6)


def test_a_prefix_sees_only_its_channels():
    teacher, student, back = inputs()
    _, parts = Distillation((4, 2))(teacher, student, back)
    _, other = Distillation((4, 2))(teacher, student.at[..., 2:].set(9.0), back)
    for name in ("cosine", "gram"):
        assert parts[f"projection/distill_{name}_d2"] == other[f"projection/distill_{name}_d2"]
        assert parts[f"projection/distill_{name}_d4"] != other[f"projection/distill_{name}_d4"]


def test_a_perfect_student_has_no_loss():
    teacher, *_ = inputs()
    loss = Distillation((WIDE,))
    value, _ = loss(teacher, teacher * 2, {WIDE: lambda x: x})
    np.testing.assert_allclose(value, 0.0, atol=1e-6)


def test_zero_cells_are_finite():
    teacher, student, back = inputs()
    loss = Distillation((4, 2))
    value, grad = jax.value_and_grad(lambda z: loss(teacher * 0, z, back)[0])(student * 0)
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("most", [2048, 5])
def test_holes_do_not_count(most):
    teacher, student, back = inputs()
    scores = cell_scores(jax.random.key(0), jnp.arange(3), 6)
    weight = jnp.asarray([1.0, 0.0, 1.0])
    loss, real = Distillation((4, 2), most), np.asarray([0, 2])

    def value(z):
        return loss(teacher, z, back, scores=scores, sample_weight=weight)[0]

    got, grad = jax.value_and_grad(value)(student.at[1].set(jnp.nan))
    alone, _ = loss(teacher[real], student[real], back, scores=scores[real])
    np.testing.assert_allclose(got, alone, rtol=1e-6)
    assert not np.any(grad[1]) and np.isfinite(grad).all()
    empty = jax.value_and_grad(
        lambda z: loss(teacher, z, back, scores=scores, sample_weight=weight * 0)[0]
    )(student)
    assert empty[0] == 0 and not np.any(empty[1])


def test_cells_are_drawn_by_place_not_by_batch():
    key, places = jax.random.key(3), jnp.asarray([5, 2, 9, 0])
    scores = cell_scores(key, places, 7)
    np.testing.assert_array_equal(cell_scores(key, places[::-1], 7), scores[::-1])
    np.testing.assert_array_equal(cell_scores(key, places, 4), scores[:, :4])
    assert np.any(np.asarray(cell_scores(jax.random.key(4), places, 7)) != np.asarray(scores))


def test_drawn_cells_are_real_different_and_uniform():
    real = jnp.arange(40) % 4 != 1
    seen = np.zeros(40)
    draw = jax.jit(lambda key: drawn_cells(jax.random.bits(key, (40,)), real, 10))
    for seed in range(300):
        chosen = np.asarray(draw(jax.random.key(seed)))
        assert len(set(chosen)) == 10 and np.all(np.asarray(real)[chosen])
        seen[chosen] += 1
    share = seen[np.asarray(real)] / 300
    assert abs(share.mean() - 1 / 3) < 1e-6 and np.all(np.abs(share - 1 / 3) < 0.11)
    few = drawn_cells(jnp.zeros(6, jnp.uint32), jnp.asarray([0, 1, 0, 1, 0, 0], bool), 3)
    assert few.tolist()[:2] == [1, 3]


def test_only_drawn_cells_enter_the_gram_term_and_all_the_cosine():
    teacher, student, back = inputs()
    scores = cell_scores(jax.random.key(0), jnp.arange(3), 6)
    chosen = np.asarray(drawn_cells(scores.reshape(-1), jnp.ones(18, bool), 5))
    loss = Distillation((4,), 5)
    value = {}
    for name in ("gram", "cosine"):
        key = f"projection/distill_{name}_d4"
        grad = jax.grad(lambda z, key=key: loss(teacher, z, back, scores=scores)[1][key])(student)
        value[name] = np.flatnonzero(np.abs(grad).sum(-1).reshape(-1))
    np.testing.assert_array_equal(value["gram"], np.sort(chosen))
    np.testing.assert_array_equal(value["cosine"], np.arange(18))


def test_what_cannot_be_is_refused():
    teacher, student, back = inputs()
    with pytest.raises(ValueError, match="has 4 channels, fewer than the prefix of 8"):
        Distillation((8, 2))(teacher, student, back)
    with pytest.raises(ValueError, match="positive widths"):
        Distillation((0,))
    with pytest.raises(ValueError, match="gram_max_tokens"):
        Distillation((4,), 0)
    with pytest.raises(ValueError, match="18 cells, more than 5"):
        Distillation((4,), 5)(teacher, student, back)
