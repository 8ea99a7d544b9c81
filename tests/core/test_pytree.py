import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import pytree_dataclass, static


@pytree_dataclass
class Point:
    """A point."""

    x: jax.Array
    y: jax.Array
    unit: str = static(default="m")


@pytree_dataclass
class Line:
    start: Point
    end: Point | None = None
    width: int = static(default=1)

    def moved(self, by):
        return dataclasses.replace(self, start=Point(self.start.x + by, self.start.y))


def test_fields_are_leaves_in_order_and_static_ones_are_not():
    line = Line(Point(1, 2), Point(3, 4, unit="km"), width=5)
    leaves, structure = jax.tree.flatten(line)
    assert leaves == [1, 2, 3, 4]
    assert structure.unflatten(leaves) == line
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(line)]
    assert paths == [".start.x", ".start.y", ".end.x", ".end.y"]
    assert jax.tree.leaves(Line(Point(1, 2))) == [1, 2]


def test_static_fields_are_structure():
    assert jax.tree.structure(Point(1, 2)) == jax.tree.structure(Point(3, 4))
    assert jax.tree.structure(Point(1, 2)) != jax.tree.structure(Point(1, 2, unit="km"))


def test_instances_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Point(1, 2).x = 3
    assert dataclasses.replace(Point(1, 2), x=3) == Point(3, 2)


def test_the_class_stays_itself():
    assert Point.__name__ == "Point"
    assert Point.__doc__ == "A point."
    assert repr(Point(1, 2)) == "Point(x=1, y=2, unit='m')"
    assert [f.name for f in dataclasses.fields(Point)] == ["x", "y", "unit"]


def test_static_takes_the_arguments_of_a_field():
    @pytree_dataclass
    class Options:
        required: int = static()
        many: list = static(default_factory=list, repr=False)

    with pytest.raises(TypeError):
        Options()
    assert Options(1).many == []
    assert "many" not in repr(Options(1))
    assert jax.tree.leaves(Options(1, [2])) == []


def test_a_static_value_recompiles_and_a_leaf_does_not():
    traced = []

    @jax.jit
    def scaled(point):
        traced.append(point.unit)
        return point.x * (1000 if point.unit == "km" else 1)

    assert scaled(Point(2.0, 0.0)) == 2
    assert scaled(Point(3.0, 1.0)) == 3
    assert scaled(Point(3.0, 1.0, unit="km")) == 3000
    assert traced == ["m", "km"]


def test_it_crosses_jit_vmap_scan_and_grad():
    points = Point(jnp.arange(3.0), jnp.arange(3.0) * 10)
    moved = jax.jit(lambda line: line.moved(1.0))(Line(points))
    assert isinstance(moved, Line)
    np.testing.assert_array_equal(moved.start.x, [1, 2, 3])

    def total(point):
        return point.x + 2 * point.y

    np.testing.assert_array_equal(jax.vmap(total)(points), [0, 21, 42])
    last, each = jax.lax.scan(lambda c, p: (c + p.x, total(p)), 0.0, points)
    assert last == 3
    np.testing.assert_array_equal(each, [0, 21, 42])
    assert jax.grad(total)(Point(1.0, 2.0)) == Point(1.0, 2.0)
