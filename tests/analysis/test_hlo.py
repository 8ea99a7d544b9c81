"""Reading the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm.analysis.hlo import read_program

# A loop over layers in a decode loop, as the TPU compiler writes them, cut short.
TEXT = """\
HloModule jit_advance, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  ROOT %sum = bf16[] add(%x, %y)
}

%retiled (input: s8[8,1024]) -> s8[8,1024] {
  ROOT %copy.1 = s8[8,1024]{1,0:T(8,128)(4,1)} copy(%input)
}

%copied (input.1: s8[8,512]) -> s8[8,512] {
  ROOT %copy.2 = s8[8,512]{0,1:T(8,128)(4,1)} copy(%input.1)
}

%layer (param: (s32[], bf16[16,4096])) -> (s32[], bf16[16,4096]) {
  %all-reduce.1 = bf16[16,4096]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), to_apply=%add
  %all-reduce-start.2 = bf16[16,4096]{1,0} all-reduce-start(%y), to_apply=%add
  %all-reduce-done.2 = bf16[16,4096]{1,0} all-reduce-done(%all-reduce-start.2)
  %ag = (bf16[2,64]{1,0}, bf16[16,64]{1,0:T(8,128)}) all-gather-start(%z)
  %flash.7 = f32[16,8]{1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call"
  %flash.9 = f32[16,8]{1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call"
  %free = s8[8,1024]{1,0} fusion(%w), output_to_operand_aliasing={}, calls=%retiled
}

%more (param.1: (s32[], bf16[16,4096])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%step (param.2: (s32[], bf16[16,4096])) -> (s32[], bf16[16,4096]) {
  %while.1 = (s32[], bf16[16,4096]) while(%t), condition=%more, body=%layer
  %pair = (f32[16]{0}, s32[16]{0}) all-reduce(%a, %b), to_apply=%add
  %other = s8[8,512]{0,1} fusion(%v), kind=kLoop, calls=%copied
}

ENTRY %main (p: bf16[16,4096]) -> bf16[16,4096] {
  %while.2 = (s32[], bf16[16,4096]) while(%u), condition=%more, body=%step
  %permute = s4[10]{0} collective-permute(%c), source_target_pairs={{0,1}}
  %copy.3 = f32[3]{0} copy(%d)
}
"""


def test_collectives_are_counted_by_kind_and_loops_around_them():
    found = {
        (c.kind, c.loop_depth): (c.count, c.bytes, c.largest_bytes)
        for c in read_program(TEXT).collectives
    }
    row = 16 * 4096 * 2
    assert found == {
        ("all-reduce", 2): (2, 2 * row, row),
        ("all-gather", 2): (1, 16 * 64 * 2, 16 * 64 * 2),
        ("all-reduce", 1): (1, 2 * 16 * 4, 2 * 16 * 4),
        ("collective-permute", 0): (1, 5, 5),
    }
    assert {c.kind for c in read_program(TEXT).collectives if not c.in_loop} == {
        "collective-permute"
    }


def test_kernels_are_counted_by_name():
    assert read_program(TEXT).kernels == {"flash": 2}


def test_a_copy_counts_where_something_moves():
    assert read_program(TEXT).largest_copy_bytes == 8 * 512
    in_place = "fusion(%v), output_to_operand_aliasing={{}: (0, {})}"
    without = TEXT.replace("fusion(%v)", in_place)
    assert read_program(without).largest_copy_bytes == 12


@pytest.mark.parametrize("text", ["", "HloModule nothing\n", "}\n{\n"])
def test_a_program_without_anything_has_nothing(text):
    found = read_program(text)
    assert (found.collectives, found.kernels, found.largest_copy_bytes) == ((), {}, 0)


def test_a_program_of_this_machine_is_read():
    def loop(x):
        return jax.lax.fori_loop(0, 9, lambda i, y: jnp.sin(y) + i, x)

    compiled = jax.jit(loop).lower(jnp.ones(8)).compile()
    assert read_program(compiled.as_text()).collectives == ()
