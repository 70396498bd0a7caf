"""One place a primitive: a file a family, and in it a row a primitive.

`program` reads a traced network by these rules in three ways: which axes its values have, what is
known of their positions, and what is left of it at smaller sizes.
"""

from functools import partial
from typing import Any

from jaxprune.structure.rules import elementwise, indexing, products, reductions, shapes
from jaxprune.structure.rules.base import Rule, unknown_axes
from jaxprune.structure.rules.calls import CALLERS, Caller, closes_over_values

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **products.RULES,
    **indexing.RULES,
    **reductions.RULES,
    **{
        name: Rule(partial(unknown_axes, reason=reason))
        for name, reason in {
            "custom_vjp_call": "whose derivative rule is for its shapes",
            "custom_jvp_call": "whose derivative rule closes over values",
            "while": "a loop that is not followed",
            "cond": "a branch that is not followed",
        }.items()
    },
}


def rule_of(eqn: Any) -> Rule:
    """Return the rule of an equation that runs no program; of an unknown one, that it is not."""
    return RULES.get(eqn.primitive.name, Rule())


def caller_of(eqn: Any) -> Caller | None:
    """Return the rule of an equation that runs programs which can be followed, or None."""
    caller = CALLERS.get(eqn.primitive.name)
    return None if caller is None or closes_over_values(eqn) else caller
