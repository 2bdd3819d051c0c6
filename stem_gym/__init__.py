"""Gymnasium environments in which agents learn to run a scanning transmission electron microscope.

`import stem_gym` registers every variant of `envs_configs`; `gymnasium.make("stem_gym/AtomTargeting-v0")` makes one.
"""

from stem_gym.envs.registration import register_variants

__version__ = "0.1.0"

register_variants()
