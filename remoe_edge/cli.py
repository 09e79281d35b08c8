"""The command line: finds commands in ``remoe_edge.commands`` and turns errors into sentences and exit statuses.

Exit statuses: 0 success, 1 failure (silent if the reader of stdout went away), 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
"""

import importlib
import os
import pkgutil
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

import remoe_edge.commands
from remoe_edge import __version__
from remoe_edge.errors import RemoeError


class _Commands(click.Group):
    """Each module of ``remoe_edge.commands`` is one command, imported only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(remoe_edge.commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"remoe_edge.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from remoe_edge.runtime.pin import load_pin, patches_digest, patches_dir

    patches = patches_dir()
    pin = load_pin(patches)
    click.echo(
        f"remoe-edge {__version__} (llama-cpp-python {pin.version}, llama.cpp {pin.llama_cpp_commit}, "
        f"patches {patches_digest(patches)[:12]})"
    )
    ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the versions of remoe-edge, its patches and the llama.cpp it builds.",
)
def cli() -> None:
    """Run fine-grained Mixture-of-Experts models in a fixed memory budget."""


def main() -> NoReturn:
    """Entry point of ``remoe-edge``."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run())


def _printable(message: str) -> str:
    """A message whose parts come from files of strangers: what would steer the terminal is written as an escape."""
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in message)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    # An exception, so that half-written files are removed and locks released.
    raise SystemExit(128 + signal.SIGTERM)


def _run() -> int:
    try:
        status = cli.main(prog_name="remoe-edge", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except (RemoeError, OSError) as error:
        if not isinstance(error, BrokenPipeError):
            click.echo(f"Error: {_printable(str(error))}", err=True)
        try:
            sys.stdout.flush()
        except OSError:
            # The interpreter flushes stdout once more on its way out; give it a place to write to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
