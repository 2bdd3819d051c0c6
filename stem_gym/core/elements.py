"""Chemical symbols and atomic numbers."""

from __future__ import annotations

from stem_gym.core.errors import ConfigError, did_you_mean

SYMBOLS = (  # noqa: SIM905 – the periodic table reads better as text
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi"
).split()


def atomic_number_of(symbol: str) -> int:
    """Atomic number of an element's symbol. Raises ConfigError for one that is not known."""
    if symbol not in SYMBOLS[1:]:
        raise ConfigError(
            f"Unknown element {symbol!r}; give a symbol such as 'Si'. {did_you_mean(symbol, SYMBOLS[1:])}"
        )
    return SYMBOLS.index(symbol)
