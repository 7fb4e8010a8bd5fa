"""Which mirrors of its metrics a run has."""

from unirl.config import MonitoringConfig
from unirl.config_rules import ConfigError, Problem
from unirl.monitoring.mirrors import Mirror, chosen_mirrors


def mirrors_of(monitoring: MonitoringConfig, *, local: bool) -> list[Mirror]:
    """The mirrors that the settings ask for, not open yet.

    Raises:
        ConfigError: Prometheus without Ray, which serves it.
        ModuleNotFoundError: a package that one needs is not installed.
        ValueError: W&B has no credentials.
    """
    mirrors = chosen_mirrors(monitoring)
    if monitoring.prometheus:
        if local:
            rule = "must be false with --local, which has no Ray to serve the metrics"
            raise ConfigError([Problem("monitoring.prometheus", True, rule, "set it to false, or leave --local out")])
        from unirl.cluster.prometheus import Prometheus

        mirrors.append(Prometheus())
    return mirrors
