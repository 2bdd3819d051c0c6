"""Probabilities of the laws of domain growth by NumPyro, as a reference for the referee.

pip install "stem-gym[reference]"
python benchmarks/hypotheses_reference.py       # stores tests/surrogates/referee_reference.json

The laws and the noise are written down anew, in JAX. NUTS (Hoffman and Gelman, JMLR 15, 1593, 2014) samples each law's
posterior; the evidence is that of bridge sampling (Meng and Wong, Statistica Sinica 6, 831, 1996) between one half of
the samples and a Gaussian fitted to the other. All biases are above the largest critical one: where a domain begins,
the likelihood jumps, which NUTS does not take.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

FILE = Path(__file__).parents[1] / "tests" / "surrogates" / "referee_reference.json"
ABSOLUTE_NM, RELATIVE = 8.0, 0.08
BIAS_V = np.array([2.5, 18.0, 6.0, 12.0, 3.5, 9.0])
TIME_S = np.array([1.0, 0.01, 100.0, 0.1, 0.01, 10.0])
SAMPLES, CHAINS = 1500, 2
Law = Callable[[Any], Any]


def _even(z: Any, low: float, high: float) -> Any:
    return low + (high - low) * jax.scipy.stats.norm.cdf(z)


def thermodynamic_1(z: Any) -> Any:
    over = (BIAS_V / _even(z[2], 0.6, 2.0)) ** (2.0 / 3.0) - 1.0
    return 20.0 * jnp.exp(0.4 * z[0]) + 100.0 * jnp.exp(0.5 * z[1]) * jnp.sqrt(over)


def thermodynamic_2(z: Any) -> Any:
    over = (BIAS_V / _even(z[2], 0.6, 2.0)) ** 2 - 1.0
    return 20.0 * jnp.exp(0.4 * z[0]) + 50.0 * jnp.exp(0.5 * z[1]) * jnp.cbrt(over)


def wall_pinning(z: Any) -> Any:
    tau0_s = 10.0 ** _even(z[2], -5.0, -3.5)
    return 1.5 * jnp.exp(0.5 * z[0]) * BIAS_V ** (1.0 + 0.3 * z[1]) * jnp.log1p(TIME_S / tau0_s)


def charge_injection(z: Any) -> Any:
    return 10.0 * jnp.exp(0.5 * z[0]) * BIAS_V ** (1.0 + 0.3 * z[1]) * TIME_S ** _even(z[2], 0.02, 0.3)


LAWS: dict[str, Law] = {one.__name__: one for one in (thermodynamic_1, thermodynamic_2, wall_pinning, charge_injection)}


def main() -> None:
    """Sample, print, store."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(5)
    cases = []
    for truth in (thermodynamic_1, thermodynamic_2):
        mean = np.asarray(truth(0.5 * rng.standard_normal(3)))
        value = mean + np.hypot(ABSOLUTE_NM, RELATIVE * mean) * rng.standard_normal(len(mean))
        value = np.round(value, 2)
        cases.append({"value_nm": value.tolist()} | {name: posterior(law, value) for name, law in LAWS.items()})
        print({name: round(cases[-1][name]["log_evidence"], 3) for name in LAWS}, flush=True)
    versions = {"numpyro": numpyro.__version__, "jax": jax.__version__}
    stored = {"versions": versions, "bias_v": BIAS_V.tolist(), "time_s": TIME_S.tolist(), "cases": cases}
    FILE.write_text(json.dumps(stored, indent=1) + "\n")


def posterior(law: Law, value: np.ndarray) -> dict[str, Any]:
    """Log evidence of a law with its standard error, mean and deviation of its parameters' standard normal numbers."""

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = law(z)
        numpyro.sample("value", dist.Normal(mean, jnp.hypot(ABSOLUTE_NM, RELATIVE * mean)).to_event(1), obs=value)

    def log_joint(z: Any) -> Any:
        mean = law(z)
        told = jax.scipy.stats.norm.logpdf(value, mean, jnp.hypot(ABSOLUTE_NM, RELATIVE * mean)).sum()
        return told + jax.scipy.stats.norm.logpdf(z).sum()

    sampler = MCMC(
        NUTS(model, target_accept_prob=0.95),
        num_warmup=500,
        num_samples=SAMPLES,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(jax.random.PRNGKey(0))
    z = np.asarray(sampler.get_samples(group_by_chain=True)["z"])  # (chains, samples, 3)
    log_z = [bridge(log_joint, z[i], z[1 - i]) for i in range(CHAINS)]
    spread = abs(log_z[0] - log_z[1]) / 2.0
    flat = z.reshape(-1, 3)
    mean, sd = flat.mean(0).tolist(), flat.std(0).tolist()
    return {"log_evidence": float(np.mean(log_z)), "error": float(spread), "mean": mean, "sd": sd}


def bridge(log_joint: Callable[[Any], Any], fitted: np.ndarray, judged: np.ndarray) -> float:
    """Log evidence by bridge sampling of samples (n, 3), from a Gaussian that is fitted to others (n, 3)."""
    centre, root = fitted.mean(0), np.linalg.cholesky(np.cov(fitted.T))
    normal = np.random.default_rng(1).standard_normal(judged.shape)
    every = jax.jit(jax.vmap(log_joint))

    def over(z: np.ndarray) -> np.ndarray:
        away = np.linalg.solve(root, (z - centre).T)
        log = -0.5 * (away**2).sum(0) - np.log(np.diag(root)).sum() - 1.5 * math.log(2.0 * math.pi)
        return np.asarray(every(z)) - log

    ours, theirs = over(judged), over(centre + normal @ root.T)
    log_z = float(np.median(ours))
    for _ in range(200):
        above = np.exp(theirs - log_z) / (1.0 + np.exp(theirs - log_z))
        below = 1.0 / (1.0 + np.exp(ours - log_z))
        log_z += math.log(above.mean() / below.mean())
    return log_z


if __name__ == "__main__":
    main()
