"""python -m launch.train key=value ...: trains Gemma 2 from one process."""

import sys
import time

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from launch.command import CONF, main, process_started
from orchestrator import config as configs
from orchestrator import manifest, preflight, rundir

STOPPED = 3
codes: list[int] = []  # one a job; a sweep leaves with the worst


@hydra.main(config_path=CONF, config_name="run", version_base="1.3")
def job(composed: DictConfig) -> None:
    if codes and codes[-1] == STOPPED:
        return  # a stopped sweep stops whole
    commanded = time.monotonic() if codes else process_started()
    container = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(container, dict)
    config = configs.from_container({str(key): value for key, value in container.items()})
    preflight.check(config)
    run_id = config.run.id or rundir.new_id(config.model.name)
    config = configs.with_id(config, run_id, config.run.root)
    folder = rundir.create(config.run.root, run_id)
    rundir.write_manifest(folder, manifest.new(config, list(HydraConfig.get().overrides.task)))

    from orchestrator.run import run  # Ray: not before the input is known to be good

    codes.append(run(config, folder, commanded))


def work() -> int:
    job()
    return max(codes, default=0)


if __name__ == "__main__":
    sys.argv[0] = "launch.train"
    main("train", work)
