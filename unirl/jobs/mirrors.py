"""Which mirrors of its metrics a run has."""

from unirl.config import MonitoringConfig
from unirl.config_rules import ConfigError, Problem
from unirl.monitoring.mirrors import Mirror, chosen_mirrors


def local_problems(monitoring: MonitoringConfig) -> list[Problem]:
    """What a run in one process cannot mirror: Ray serves Prometheus."""
    rule = "must be false with --local, which has no Ray to serve the metrics"
    fix = "set it to false, or leave --local out"
    return [Problem("monitoring.prometheus", True, rule, fix)] if monitoring.prometheus else []


def mirrors_of(monitoring: MonitoringConfig, *, local: bool) -> list[Mirror]:
    """The mirrors that the settings ask for, not open yet.

    Raises:
        ConfigError: Prometheus without Ray, which serves it.
        ModuleNotFoundError: a package that one needs is not installed.
        ValueError: W&B has no credentials.
    """
    if local and (problems := local_problems(monitoring)):
        raise ConfigError(problems)
    mirrors = chosen_mirrors(monitoring)
    if monitoring.prometheus:
        from unirl.cluster.prometheus import Prometheus

        mirrors.append(Prometheus())
    return mirrors
