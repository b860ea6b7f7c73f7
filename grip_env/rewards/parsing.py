"""Parsing of rewards from text, for command lines and saved configurations.

A text is a name, a sum of names, or the location of an object to import. Nothing is evaluated as Python: a sum is
parsed, and only names of rewards, numbers and ``+ - * /`` are allowed.
"""

from __future__ import annotations

import ast
import inspect
import operator
import pkgutil
from collections.abc import Callable
from typing import Any

from grip_env.rewards.terms import REWARDS, Reward, check_reward

__all__ = ["read_reward", "resolve_reward"]

_LONGEST = 500  # characters; very deep nesting would exhaust the stack

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: lambda value: value,
}


def read_reward(text: str) -> Reward:
    """Return the reward that ``text`` describes.

    Args:
        text: A name in :data:`~grip_env.rewards.terms.REWARDS`; names and numbers with ``+ - * /`` and parentheses; or
            "package.module:object", where the object is a reward, or a class or function that returns one when called
            without arguments.

    Raises:
        ValueError: If the text is none of these, or the object cannot be imported.

    >>> read_reward("log_likelihood - 0.1 * kept_fraction")
    AnswerLogLikelihood() - 0.1 * KeptFraction()
    """
    try:
        return _imported(text) if ":" in text else _parsed(text)
    except Exception as error:  # a user-defined module may raise anything
        reason = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
        raise ValueError(
            f"cannot read the reward {text!r} ({kind}{reason}): give one of {', '.join(REWARDS)}, a sum such as "
            "'log_likelihood - 0.1 * kept_fraction', or where to import your own, as 'package.module:object'"
        ) from error


def _imported(place: str) -> Reward:
    found = pkgutil.resolve_name(place)
    return check_reward(found() if _makes_a_reward(found) else found)


def _makes_a_reward(found: Any) -> bool:
    """Return whether an imported object makes a reward, rather than being one.

    It does if it is a class, or takes no arguments instead of ``scores`` and ``full``.
    """
    if isinstance(found, type):
        return True
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # not callable, or written in C
        return False
    return not _takes(signature, None, None) and _takes(signature)


def _takes(signature: inspect.Signature, *arguments: Any) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _parsed(text: str) -> Reward:
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text)} characters, more than {_LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(error.msg) from None
    value = _value(tree.body)
    if isinstance(value, float):
        raise ValueError("it names no reward")
    return check_reward(value)


def _value(node: ast.expr) -> Any:
    """Return the reward or the number (float) that a node represents."""
    if isinstance(node, ast.Name):
        if node.id not in REWARDS:
            raise ValueError(f"there is no reward {node.id!r}")
        return REWARDS[node.id]()
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError(f"{ast.unparse(node)!r} is not a name, a number, or one of + - * /")


def resolve_reward(reward: str | Reward) -> Reward:
    """Return a reward, given itself or its description as text.

    Args:
        reward: An object; one of the names in :data:`REWARDS`; a sum of them, such as "log_likelihood - 0.1 *
            kept_fraction"; or the location of a user-defined one, such as "my_package.my_module:my_reward".

    Raises:
        ValueError: If the text is none of these.
        TypeError: If it is neither a string nor a callable object.
    """
    if isinstance(reward, str):
        return read_reward(reward)
    return check_reward(reward)
