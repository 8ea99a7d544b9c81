"""What a model costs on hardware that need not be here."""

from jaxllm.analysis.aot import Compilation, compile_ahead, in_compiler
from jaxllm.analysis.architectures import (
    ARCHITECTURES,
    Target,
    find_config,
    make_target,
)
from jaxllm.analysis.hardware import HARDWARE, Hardware, Slice, parse_slice, probe_cpu
from jaxllm.analysis.operators import PHASES, Operator, Workload
from jaxllm.analysis.roofline import (
    Cost,
    Report,
    analyze,
    breakeven_T,
    payoff_roofline,
    sweep,
    verify_costs,
)

__all__ = [
    "ARCHITECTURES",
    "HARDWARE",
    "PHASES",
    "Compilation",
    "Cost",
    "Hardware",
    "Operator",
    "Report",
    "Slice",
    "Target",
    "Workload",
    "analyze",
    "breakeven_T",
    "compile_ahead",
    "find_config",
    "in_compiler",
    "make_target",
    "parse_slice",
    "payoff_roofline",
    "probe_cpu",
    "sweep",
    "verify_costs",
]
