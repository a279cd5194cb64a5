"""Holds compiled kernels to the thresholds."""

import re
from collections.abc import Iterable

from gpu_gate.cuda import element_type
from gpu_gate.limits import Limits, Rule
from gpu_gate.machine_code import Code, Kernel
from gpu_gate.thresholds import LIMITS, RULES


def limits_of(kernel: Kernel, kind: str, rules: Iterable[Rule] = RULES) -> Limits:
    limits = LIMITS[kind]
    for rule in rules:
        if applies(rule, kernel, kind):
            limits = limits._replace(**rule.limits)
    return limits


def applies(rule: Rule, kernel: Kernel, kind: str) -> bool:
    architectures = rule.architectures or (kernel.architecture,)
    return rule.kind == kind and kernel.architecture in architectures and bool(re.search(rule.kernels, kernel.name))


def of_code(code: Code, limits: Limits, double: bool, straight: bool) -> Iterable[tuple[str, float, float]]:
    """(what, how much, at most) of a loop, or of a kernel without one, which may end narrowly where its tensor does."""
    if not straight:
        yield "loads and stores of less than 16 bytes in hot code", code.narrow(), limits.narrow
        yield "atomics in hot code", code.atomics, limits.atomics
    yield "divisions, roots and calls in hot code", code.divisions, limits.divisions
    yield "exponentials in hot code", code.functions, limits.functions
    if not double:
        yield "float64 instructions in hot code", code.fp64, limits.fp64


def violations(kernel: Kernel, limits: Limits) -> list[str]:
    """One line for each threshold that the kernel does not keep."""
    double = element_type(kernel.name) == "double" or kernel.name.endswith(" fp64")
    found = [
        ("registers", kernel.registers, limits.registers),
        ("accesses to local memory", kernel.whole.local + kernel.spills, limits.spills),
        ("bytes of stack", kernel.stack, limits.stack),
        ("bytes of static shared memory", kernel.shared, limits.shared),
    ]
    for code in kernel.loops or [kernel.whole]:
        found += of_code(code, limits, double, straight=not kernel.loops)
    lines = [f"{what}: {value}, at most {most}" for what, value, most in found if value > most]
    occupancy = kernel.occupancy(limits.dynamic_shared)
    if occupancy < limits.occupancy:
        lines.append(f"occupancy: {occupancy:.0%}, at least {limits.occupancy:.0%}")
    for what, codes, least in (
        ("of a round", kernel.loops or [kernel.whole], limits.round),
        ("of all code", [kernel.whole], max(limits.whole, kernel.tile)),
    ):
        rounds = [code.wide() for code in codes]
        if not any(loads >= least[0] and stores >= least[1] for loads, stores in rounds):
            lines.append(f"loads and stores of 16 bytes {what}: {rounds}, at least {least}")
    return [f"{kernel.architecture} {kernel.name}: {line}" for line in dict.fromkeys(lines)]


def judge(kernels: Iterable[Kernel], kind: str, rules: Iterable[Rule] = RULES) -> list[str]:
    """All violations. kind: "cuda" or "triton"."""
    return [line for kernel in kernels for line in violations(kernel, limits_of(kernel, kind, rules))]


def unused_rules(kernels: Iterable[Kernel], kind: str) -> list[str]:
    """The patterns of rules, for any of the kernels' architectures, that no kernel matches."""
    every = list(kernels)
    compiled = {kernel.architecture for kernel in every}
    rules = [r for r in RULES if r.kind == kind and (not r.architectures or compiled & set(r.architectures))]
    return [rule.kernels for rule in rules if not any(applies(rule, kernel, kind) for kernel in every)]
