"""The grid beside a checkpoint: read, found for each weight of the graph, or refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from owl_deploy.errors import BadInput
from owl_deploy.export import rewrites
from owl_deploy.export.grid import Grid
from owl_deploy.models.rounded_grid import write_grid
from tests.unit.export.test_rewrites import SILU, rewriter, unpacked


def write(folder: Path, names: list[str], shape: tuple[int, ...] = (4, 1), **told: str) -> Path:
    scales = {f"{name}.weight_scale": torch.full(shape, 0.5) for name in names}
    save_file(scales, folder / "grid.safetensors", metadata={"bits": "4", "group": "32"} | told)
    return folder


def test_a_checkpoint_without_a_grid(tmp_path: Path) -> None:
    assert Grid.read(tmp_path) is None


@pytest.mark.parametrize(
    ("told", "complaint"),
    [({"bits": "four"}, "no grid|not a grid"), ({"group": "48"}, "48 columns share a scale")],
)
def test_what_is_no_grid(tmp_path: Path, told: dict[str, str], complaint: str) -> None:
    write(tmp_path, ["a"], **told)
    with pytest.raises(BadInput, match=complaint):
        Grid.read(tmp_path)
    write(tmp_path, ["a"], shape=(4,))
    with pytest.raises(BadInput, match="scales of no matrix"):
        Grid.read(tmp_path)
    write(tmp_path, ["a"], bits="9")
    with pytest.raises(BadInput, match="other bits"):
        Grid.read(tmp_path)
    (tmp_path / "grid.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="not a grid"):
        Grid.read(tmp_path)


@pytest.mark.parametrize(
    ("bits", "holders"),
    [
        (3, ["int8", "int4", "int3"]),
        (4, ["int8", "int4", None]),
        (8, ["int8", None, None]),
    ],
)
def test_what_can_hold_it(tmp_path: Path, bits: int, holders: list[str | None]) -> None:
    grid = Grid.read(write(tmp_path, ["a"], bits=str(bits)))
    assert grid is not None
    assert [grid.holder(bits, "fp32"), grid.holder(bits, "bf16")] == [None, None]
    assert [grid.holder(bits, values) for values in ("int8", "int4", "int3")] == holders


def test_where_each_has_its_own_bits_it_keeps_them(tmp_path: Path) -> None:
    scales = {f"{n}.weight_scale": torch.ones(4, 1) for n in "abc"}
    write_grid(tmp_path, scales, {"a": 4, "b": 8, "c": 3}, 32)
    grid = Grid.read(tmp_path)
    assert grid is not None
    assert grid.bits == {"a": 4, "b": 8, "c": 3}
    for values in ("int4", "int3"):
        assert [grid.holder(bits, values) for bits in (3, 4, 8)] == ["int3", "int4", "int8"]
    assert [grid.holder(bits, "int8") for bits in (3, 4, 8)] == ["int8", "int8", "int8"]
    assert grid.holder(8, "bf16") is None


@pytest.mark.parametrize(("bits", "holder"), [(3, "int4"), ({"a": 3, "b": 3}, "int3")])
def test_bits_that_were_chosen_for_each_are_kept_where_they_are_alike(
    tmp_path: Path, bits: int | dict[str, int], holder: str
) -> None:
    write_grid(tmp_path, {f"{n}.weight_scale": torch.ones(4, 1) for n in "ab"}, bits, 32)
    grid = Grid.read(tmp_path)
    assert grid is not None
    assert grid.bits == {"a": 3, "b": 3}
    assert grid.holder(3, "int4") == holder


def test_a_grid_that_leaves_out_the_bits_of_a_linear(tmp_path: Path) -> None:
    scales = {f"{n}.weight_scale": torch.ones(4, 1) for n in "abc"}
    write_grid(tmp_path, scales, {"a": 4, "c": 8}, 32)
    with pytest.raises(BadInput, match=r"not a grid: 'b\.bits'"):
        Grid.read(tmp_path)


def test_weights_of_the_graph_are_found_by_their_linears(tmp_path: Path) -> None:
    block = "model.layers.3"
    attention = [f"{block}.self_attn.{name}_proj" for name in "qkvo"]
    grid = Grid.read(write(tmp_path, [*attention, f"{block}.mlp.up_proj"]))
    assert grid is not None
    for name, rows in (("attn.qkv", 12), ("attn.o", 4), ("mlp.up", 4)):
        found = grid.of(f"{block}.{name}_proj.MatMul.weight")
        assert found is not None
        assert found.scales.shape == (rows, 1)
        assert found.bits == 4
    assert grid.of(f"{block}.mlp.gate_proj.MatMul.weight") is None
    del grid.scales[attention[1]]
    assert grid.of(f"{block}.attn.qkv_proj.MatMul.weight") is None


def test_the_halves_of_phi_3s_gate_and_up_are_found() -> None:
    name = "model.layers.0.mlp.gate_up_proj"
    scales = np.arange(8, dtype=np.float32).reshape(8, 1)
    grid = Grid({name: 8}, 32, {name: scales})
    for half, values in (("gate", scales[:4]), ("up", scales[4:])):
        found = grid.of(f"model.layers.0.mlp.{half}_proj.MatMul.weight")
        assert found is not None
        assert found.bits == 8
        np.testing.assert_array_equal(found.scales, values)


def test_gate_and_up_keep_their_grids() -> None:
    rng = np.random.default_rng(0)
    scales = {name: np.float32(2.0 ** rng.integers(-5, 0, (20, 1))) for name in "gu"}
    weights = {
        name: (rng.integers(-8, 8, (20, 8)) * scale).T.astype(np.float32)
        for name, scale in scales.items()
    }
    graph = rewriter(SILU, weights)
    graph.precision, graph.grid = "int4", Grid({"g": 4, "u": 4}, 32, scales)
    assert rewrites.fuse_gated(graph) == 1
    both = unpacked(graph, "g+up.packed").reshape(-1, 2, 16, 8)
    for place, name in enumerate("gu"):
        np.testing.assert_array_equal(both[:, place].reshape(-1, 8)[:20], weights[name].T)
    assert graph.on_grid == 1


def test_of_gate_and_up_one_keeps_its_grid_where_it_alone_has_one() -> None:
    weights = {name: np.full((8, 20), 2.0, np.float32) for name in "gu"}
    graph = rewriter(SILU, weights)
    graph.precision = "int4"
    graph.grid = Grid({"g": 4}, 32, {"g": np.ones((20, 1), np.float32)})
    assert rewrites.fuse_gated(graph) == 0
    rewrites.replace_matmuls(graph)
    assert (len(graph.packed), graph.on_grid) == (2, 1)


def test_a_weight_off_its_grid_is_named() -> None:
    weight = np.full((8, 20), 0.3, dtype=np.float32)
    graph = rewriter([("MatMul", "x w", "a"), ("Neg", "a", "y")], {"w": weight})
    graph.precision, graph.grid = "int4", Grid({"w": 4}, 32, {"w": np.ones((20, 1), np.float32)})
    with pytest.raises(BadInput, match="w cannot be packed: a weight does not lie on its grid"):
        rewrites.replace_matmuls(graph)


@pytest.mark.parametrize(("bits", "kept"), [(8, 0), (4, 1)])
def test_a_grid_of_more_bits_is_rounded_anew(bits: int, kept: int) -> None:
    weight = np.arange(160, dtype=np.float32).reshape(8, 20) % 7
    graph = rewriter([("MatMul", "x w", "a"), ("Neg", "a", "y")], {"w": weight})
    graph.precision, graph.grid = "int4", Grid({"w": bits}, 32, {"w": np.ones((20, 1), np.float32)})
    rewrites.replace_matmuls(graph)
    assert graph.on_grid == kept
