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

from gemma.config import ConfigError
from orchestrator.config import unknown_key

CONF = str(Path(__file__).parents[1] / "conf")


HYDRA_FLAGS = (
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-r", "--run"),
    *("-m", "--multirun", "-sc", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name"),
    *("-cd", "--config-dir", "--experimental-rerun", "-i", "--info"),
)
MISTAKES = (ConfigError, HydraException, OmegaConfBaseException)


def tell(name: str, error: Exception) -> None:
    print(f"{name}: {one_line(error)}", file=sys.stderr)


def main(name: str, work: Callable[[], int]) -> None:
    """Runs a command's work and exits: its code, or 1 with one line for a mistake of the user's."""
    # Hydra prints its errors over many lines; asked for all, it raises them, and they are told here in one.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        code = work()
    except MISTAKES as error:
        tell(name, error)
        code = 1
    except ValueError as error:
        if not raised_by_hydra(error):
            raise
        tell(name, error)
        code = 1
    except SystemExit as left:  # argparse leaves with 2 for a mistake, which here means that a run gave up
        code = 1 if left.code else 0
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def raised_by_hydra(error: Exception) -> bool:
    """Some mistakes it tells by a plain ValueError: data=null, --cfg together with -m."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and f"{os.sep}hydra{os.sep}" in frames[-1].filename


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
        return f"{error.override}: not an override; allowed is key=value ({text.splitlines()[0]})"
    return " ".join(text.split())


def checked(arguments: list[str]) -> list[str]:
    """The arguments, the sweep's flag first: argparse takes no override after one.

    Raises ConfigError for what Hydra would answer over many lines: other flags, a group without a choice.
    """
    for argument in arguments:
        if argument.startswith("-") and argument.partition("=")[0] not in HYDRA_FLAGS:
            raise ConfigError(f"{argument}: unknown flag; allowed are key=value and {' '.join(HYDRA_FLAGS)}")
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
    return own, rest


def apply(container: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A resolved config with overrides in Hydra's grammar laid over it; group=name takes that file of conf/."""
    config = OmegaConf.create(container)
    for override in OverridesParser.create().parse_overrides(overrides):
        key, value = override.key_or_group, override.value()
        text = f"{key}={override.value_str if hasattr(override, 'value_str') else value}"
        if override.is_sweep_override() or override.is_delete() or override.is_add():
            raise ConfigError(f"{override.input_line}: a resumed run takes key=value only")
        if "." not in key and OmegaConf.is_dict(OmegaConf.select(config, key)):
            with initialize_config_dir(CONF, version_base="1.3"):
                section = compose("run", [override.input_line or text])[key]
            GlobalHydra.instance().clear()
            OmegaConf.update(config, key, OmegaConf.to_container(section, resolve=True), merge=False)
        elif OmegaConf.select(config, key, default=Ellipsis) is Ellipsis:
            raise ConfigError(unknown_key(key))
        else:
            OmegaConf.update(config, key, value, merge=False)
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return {str(name): section for name, section in found.items()}
