"""Checks of the contracts that anybody can run on a part of their own; the parts that ship pass the same ones.

    from stem_gym.core.conformance import check_instrument, check_vector_env

    check_instrument(MyMicroscope(…))
    check_vector_env(lambda **kw: gymnasium.make_vec("me/MyTask-v0", **kw))

Both return nothing and raise ConformanceError for the first rule that is broken. The check of a policy is
`agents.engine.checks.check_policy`.
"""

from stem_gym.core.conformance.instrument import check_instrument
from stem_gym.core.conformance.vector_env import check_vector_env
from stem_gym.core.errors import ConformanceError

__all__ = ["ConformanceError", "check_instrument", "check_vector_env"]
