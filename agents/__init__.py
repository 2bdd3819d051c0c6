"""Agents for the environments of stem_gym: the policy contract, one file per agent, evaluation and training.

policy = agents.make("lock_on", env)
episodes = agents.evaluate(policy, "stem_gym/AtomTargeting-v0", episodes=20, seed=1)
"""

from agents.engine.checks import check_policy
from agents.engine.evaluate import evaluate
from agents.engine.roster import describe, load, make, names, shipped, shipped_policies, train
from agents.policy import Face, Policy, Transition, face_of

list_agents = names

__all__ = [
    "Face",
    "Policy",
    "Transition",
    "check_policy",
    "describe",
    "evaluate",
    "face_of",
    "list_agents",
    "load",
    "make",
    "names",
    "shipped",
    "shipped_policies",
    "train",
]
