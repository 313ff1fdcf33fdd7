"""What every command shares: overrides in, one line for a mistake, the exit code out."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gemma.config import ConfigError, require_local
from orchestrator.config import unknown_key
from orchestrator.exit import Exit
from orchestrator.slices.environment import bypass_proxy

TOP = str(Path(__file__).parents[1])
CONF = str(Path(TOP, "conf"))


HYDRA_FLAGS = (
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-r", "--run"),
    *("-m", "--multirun", "-sc", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name"),
    *("-cd", "--config-dir", "--experimental-rerun", "-i", "--info"),
)
FLAGS_WITH_VALUE = ("--cfg", "--package", "--config-path", "--config-name", "--config-dir", "--experimental-rerun")
MAKE_FILES = ("hydra.output_subdir", "hydra.run.dir", "hydra.job.chdir")
PATHS = {"run.root", "from", "to", "tokenizer", "weights"}  # of commands' own arguments
MISTAKES = (ConfigError, HydraException, OmegaConfBaseException)


def tell(name: str, error: Exception) -> None:
    print(f"{name}: {one_line(error)}", file=sys.stderr)


def main(name: str, work: Callable[[], int]) -> None:
    """Runs a command's work and exits: its code, or 1 with one line for a mistake of the user's."""
    # Hydra prints its errors over many lines; asked for all, it raises them, and they are printed here in one.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    bypass_proxy()
    try:
        code = work()
    except BrokenPipeError:  # nobody reads on, as with `| head`: no fault of anybody
        code = Exit.FINISHED
    except MISTAKES as error:
        tell(name, error)
        code = 1
    except (ValueError, OSError) as error:
        if not raised_by_hydra(error):
            raise
        tell(name, error)
        code = 1
    except KeyboardInterrupt:  # before a run, or between two
        code = Exit.STOPPED
    except SystemExit as left:  # argparse leaves with 2 for a mistake, which here means that a run gave up
        code = 1 if left.code else 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush on the way out
    sys.stderr.flush()
    sys.exit(code)


def raised_by_hydra(error: Exception) -> bool:
    """Some mistakes it tells by plain errors: data=null, --cfg together with -m, a hydra.run.dir that cannot be."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = tuple(str(Path(TOP, folder)) for folder in ("orchestrator", "gemma"))
    return any(f"{os.sep}hydra{os.sep}" in file for file in files) and not any(file.startswith(ours) for file in files)


def process_started() -> float:
    """When this process was started, imports and all, on the clock of time.monotonic() (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s


def one_line(error: Exception) -> str:
    """The key, what came and what is allowed."""
    text = str(error)
    if isinstance(error, ConfigCompositionException):
        unknown = re.search(r"Could not (?:override|append to config)[^']*'([^']+)'", text)
        if unknown and "is already at" not in text:
            return unknown_key(unknown.group(1).lstrip("+"))
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)'\s+Available options in '[^']+':\s+(.*?)(?:\n\S|$)", text, re.S)
        if found:
            group, _, choice = found.group(1).rpartition("/")
            return f"{group}={choice}: no such choice; allowed: {', '.join(found.group(2).split())}"
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        quoted = f"; a value with special characters is quoted: '{key}=\"{value}\"'" if equals and value else ""
        return f"{error.override}: not an override; allowed is key=value{quoted} ({text.splitlines()[0]})"
    return " ".join(text.split())


def checked(arguments: list[str]) -> list[str]:
    """The arguments, the sweep's flag first: argparse takes no override after one.

    Raises ConfigError for what Hydra would answer over many lines: other flags, a group without a choice.
    """
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if argument.startswith("-") and (flag not in HYDRA_FLAGS or equals and flag not in FLAGS_WITH_VALUE):
            raise ConfigError(f"{argument}: unknown flag; allowed are key=value and {' '.join(HYDRA_FLAGS)}")
        if argument.lstrip("+").partition("=")[0] in MAKE_FILES:
            raise ConfigError(f"{argument}: Hydra's own files are off; a run's are in run.root")
    for group, _, value in (argument.partition("=") for argument in arguments):
        if value in ("", "null") and Path(CONF, group).is_dir():
            choices = sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))
            raise ConfigError(f"{group}={value}: no such choice; allowed: {', '.join(choices)}")
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag in ("-c", "--cfg") and value not in ("job", "hydra", "all"):
            raise ConfigError(f"{flag} {value}: allowed are job, hydra and all")
    return sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))


def arguments(known: dict[str, str], usage: str) -> tuple[dict[str, str], list[str]]:
    """Splits this command's own key=value arguments (`known`, with their defaults) from overrides of the run."""
    own, rest = dict(known), []
    for argument in sys.argv[1:]:
        if argument in ("-h", "--help"):
            print(usage)
            raise SystemExit(0)
        key, equals, value = argument.partition("=")
        if not equals or argument.startswith("-"):
            raise ConfigError(f"{argument}: not an override; allowed is key=value, and --help")
        if key in known:
            own[key] = value
        else:
            rest.append(argument)
    for key in PATHS & own.keys():
        require_local(key, own[key])
    return own, rest


VALUES = ("eval.sets", "serve.replicas")  # sections that are given as a value too


def apply(container: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A resolved config with overrides in Hydra's grammar laid over it; group=name takes that file of conf/."""
    config = OmegaConf.create(container)
    for override in OverridesParser.create().parse_overrides(overrides):
        key, line = override.key_or_group, str(override.input_line)
        if override.is_sweep_override() or override.is_delete() or override.is_add():
            raise ConfigError(f"{line}: a resumed run takes key=value only")
        if OmegaConf.select(config, key, default=Ellipsis) is Ellipsis:
            raise ConfigError(unknown_key(key))
        if OmegaConf.is_dict(OmegaConf.select(config, key)) and key not in VALUES:
            if not Path(CONF, key).is_dir() or not isinstance(override.value(), str):
                raise ConfigError(f"{line}: {key} is a section; allowed is {key}.NAME=value")
            with initialize_config_dir(CONF, version_base="1.3"):
                section = compose("run", [line])[key]
            GlobalHydra.instance().clear()
            # Unresolved: what the file takes from elsewhere (mesh=multislice) it takes from this run.
            OmegaConf.update(config, key, OmegaConf.to_container(section, resolve=False), merge=False)
        else:
            OmegaConf.update(config, key, override.value(), merge=False)
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return {str(name): section for name, section in found.items()}
