"""Which primitives of JAX have which rules: `pytest tests/test_rules.py -s` prints them."""

import jax
from jax.extend.core import Primitive, primitives

from jaxprune.structure.rules import (
    CALLERS,
    RULES,
    elementwise,
    indexing,
    products,
    reductions,
    shapes,
)
from jaxprune.structure.rules.base import Rule, unknown_facts

# Of which nothing can be known from what goes in.
NOTHING_KNOWN = {"random_bits"}
NOT_FOLLOWED = {"custom_vjp_call", "custom_jvp_call", "while", "cond"}  # with a reason of their own


def known_to_jax() -> dict[str, Primitive]:
    found = [value for value in vars(primitives).values() if isinstance(value, Primitive)]
    return {primitive.name: primitive for primitive in found}


def test_every_primitive_that_has_axes_has_facts() -> None:
    names = {*known_to_jax(), *RULES, *CALLERS}
    print(f"\njax {jax.__version__}")
    for name in sorted(names):
        rule = RULES.get(name)
        has = [p for p in Rule._fields if rule and getattr(rule, p) != getattr(Rule(), p)]
        kind = "runs programs" if name in CALLERS else ", ".join(has)
        print(f"{name:32} {kind or 'not understood'}")
    lacking = {name for name, rule in RULES.items() if rule.facts is unknown_facts}
    assert lacking == NOTHING_KNOWN | NOT_FOLLOWED


def test_there_is_one_rule_a_primitive() -> None:
    assert {*RULES} & {*CALLERS} == {"custom_jvp_call"}  # where its derivative cannot be followed
    tables = [family.RULES for family in (elementwise, shapes, products, indexing, reductions)]
    assert sum(map(len, tables)) + len(NOT_FOLLOWED) == len(RULES)
