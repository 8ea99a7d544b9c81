"""The hardware table, its spelling, and the probe of this machine."""

import pytest

from jaxllm.analysis import HARDWARE, parse_slice, probe_cpu
from jaxllm.core.errors import ConfigError
from jaxllm.training.throughput import _BFLOAT16_PEAKS


@pytest.mark.parametrize(
    ("text", "chips", "devices", "name"),
    [
        ("v5e:2x4", 8, 8, "v5e:2x4"),
        ("v6e", 1, 1, "v6e:1x1"),
        ("v6e:16x16", 256, 256, "v6e:16x16"),
        ("v4:2x2x1", 4, 4, "v4:2x2x1"),
        ("v5p:4x4x4", 64, 64, "v5p:4x4x4"),
        ("tpu7x:2x2x1", 4, 8, "tpu7x:2x2x1"),
        ("h200", 1, 1, "h200:1"),
        ("a100:8", 8, 8, "a100:8"),
    ],
)
def test_a_name_is_a_generation_and_how_its_chips_lie(text, chips, devices, name):
    found = parse_slice(text)
    assert (found.chips, found.devices, found.name) == (chips, devices, name)
    assert parse_slice(found.name) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5", "unknown hardware: 'v5', expected one of a100, cpu.*mean 'v5[ep]'"),
        ("", "unknown hardware"),
        ("v5e:2", "'v5e:2' is no such machine, expected chips along 2 axes"),
        ("v5e:2x2x1", "chips along 2 axes, such as v5e:2x4"),
        ("v5p:2x2", "chips along 3 axes, such as v5p:2x2x1"),
        ("v5e:0x4", "expected 1 to 256 chips"),
        ("v5e:-2x4", "chips along 2 axes"),
        ("v5e:²x4", "chips along 2 axes"),
        ("v5e:32x16", "expected 1 to 256 chips"),
        ("v5e:", "chips along 2 axes"),
        ("h200:9", "expected 1 to 8 chips"),
        ("cpu:2", "expected cpu alone"),
        (f"v5e:{'9' * 5000}x4", "expected 1 to 256 chips"),
    ],
)
def test_a_wrong_name_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_slice(text)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_figure_has_a_source(name):
    hardware = HARDWARE[name]
    assert hardware.name == name
    assert hardware.source.startswith("datasheet: ")
    assert hardware.date
    # A chip reads all its memory in 5 to 100 ms, and does 50 to 1000 operations a byte.
    assert 0.005 < hardware.memory_bytes / hardware.bandwidth < 0.1
    assert 50 < hardware.peak("bfloat16") / hardware.bandwidth < 1000
    assert hardware.interconnect < hardware.bandwidth


def test_the_peaks_are_those_that_training_reports_with():
    assert {n: p for n, p in _BFLOAT16_PEAKS.items() if n in HARDWARE} == {
        name: hardware.peak("bfloat16")
        for name, hardware in HARDWARE.items()
        if name in _BFLOAT16_PEAKS
    }


def test_a_missing_peak_is_that_of_bfloat16():
    v5e, h100 = HARDWARE["v5e"], HARDWARE["h100"]
    assert v5e.peak("float32") == v5e.peak("bfloat16") == 197e12
    assert v5e.peak("int8") == 393e12
    assert h100.peak("float32") == 494e12


def test_a_device_is_its_share_of_the_chip():
    tpu7x = HARDWARE["tpu7x"]
    half = tpu7x.device()
    assert half.bandwidth == tpu7x.bandwidth / 2
    assert half.peak("bfloat16") == tpu7x.peak("bfloat16") / 2
    assert half.memory_bytes == 96 * 2**30
    assert HARDWARE["v5p"].device() == HARDWARE["v5p"]


def test_the_probe_finds_figures_of_a_cpu():
    cpu = probe_cpu()
    assert 5e8 < cpu.bandwidth < 5e12
    assert 1e8 < cpu.peak("float32") < 1e14
    assert cpu.peak("bfloat16") == cpu.peak("float32")
    assert cpu.memory_bytes > 2**28
    assert cpu.source.startswith("measured")
    assert parse_slice("cpu").hardware.name == "cpu"
