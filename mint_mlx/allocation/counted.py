"""Which errors count: a large relative error of weights that do nothing does nothing.

An expert that training never reached, or that was pruned, may have weights of a 1e-8th of its
peers'. No configuration holds these to 9 dB, since MLX's scales end at 1e-7, and yet an error as
large as they are is nothing beside the rounding of any other expert.
"""

from __future__ import annotations

import numpy as np

from ..base.quant_config import QuantConfig
from ..measure.curve import RateDistortion, sqnr_db

NEGLIGIBLE = 1e-6  # of the peers' sum of squares: weights of a thousandth of theirs
BROKEN = 1e50  # an NMSE of this size stands for infinite weights, which always count


def counted_errors(
    curve: RateDistortion, config: QuantConfig, weighted: bool = False
) -> np.ndarray:
    """NMSE of each expert under a configuration, zero where neither weights nor error matter.

    Both are compared with the sum of squares of the layer's other experts: the median of the larger
    half, so that neither one huge expert nor many idle ones make the others negligible.

    Args:
        curve: of the layer.
        config: the configuration.
        weighted: whether the NMSE is the one with weights of the columns.

    Returns:
        float64 (experts,).
    """
    errors = curve.of(config, weighted)
    energy = np.asarray(curve.energy)
    if len(energy) < 2 or energy.shape != errors.shape:
        return errors
    larger = np.sort(energy)[len(energy) // 2 :]
    usual = larger[(len(larger) - 1) // 2]
    limit = NEGLIGIBLE * usual
    idle = (energy <= limit) & (errors < BROKEN) & (errors * energy <= limit)
    return np.where(idle, 0.0, errors)


def describe_veto(
    curve: RateDistortion, configs: tuple[QuantConfig, ...], has_experts: bool
) -> str:
    """Why the safety floor forbids all of a layer's configurations, and how to allow one.

    Args:
        curve: of the layer.
        configs: its candidates; at least one is quantized.
        has_experts: whether its curve has a column for each expert.
    """
    quantized = [config for config in configs if config.quantized]
    best = min(quantized, key=lambda config: float(counted_errors(curve, config).max()))
    errors = counted_errors(curve, best)
    decibels = round(sqnr_db(float(errors.max())), 1) + 0.0  # without a sign of zero
    expert = f" (expert {int(errors.argmax())})" if has_experts else ""
    return (
        f"{curve.path}{expert} reaches {decibels:.1f} dB at most, at {best}, "
        f"and would stay unquantized: --override '{curve.path}={best}' quantizes it all the same"
    )
