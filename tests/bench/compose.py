"""A run's configuration from overrides, as launch.train composes it."""

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch.plan import CONF
from orchestrator import config as configs
from orchestrator.config import Config


def composed(overrides: list[str]) -> Config:
    with initialize_config_dir(CONF, version_base="1.3"):
        container = OmegaConf.to_container(compose("run", overrides), resolve=True)
    assert isinstance(container, dict)
    return configs.from_container({str(key): value for key, value in container.items()})
