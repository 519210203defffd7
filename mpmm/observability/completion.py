"""`mpmm completion` and `mpmm man`: scripts for shells and a manual page, made from the parser of the command line.

So they cannot contradict it. The scripts ask for the names of namespaces and models when the user presses Tab.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

__all__ = ["SHELLS", "completion", "man_page"]

# Shell commands that print one word for each namespace, and for each tag.
_NAMESPACES = "mpmm list 2>/dev/null | grep -v ' '"
_TAGS = "mpmm ps --format '{tag}' 2>/dev/null"
_ASKED_FOR = {"namespace": _NAMESPACES, "tag": _TAGS}
# The metavars of options whose values are files.
_FILES = ("FILE", "FOLDER")
# What bash runs when the user presses Tab; it calls `_mpmm_words`, which `_bash` makes from the parser.
_COMPLETE = r"""
# Sets `words` and `current` to what a command line means up to here, and `quote` to a quote that is open at its end.
# Fails if the line has an expansion: with text added after a `$` it might run a command.
_mpmm_split() {
    local line=$1 at=0 char word="" begun=""
    words=() quote=""
    for ((at = 0; at < ${#line}; at++)); do
        char=${line:$at:1}
        if [ -n "$quote" ] && [ "$char" = "$quote" ]; then quote=""
        elif [ "$quote" = "'" ]; then word=$word$char
        elif [[ $char == [\$\`] ]]; then return 1
        elif [ "$char" = '\' ]; then
            at=$((at + 1))
            # Between double quotes, a backslash before any other character stands for itself.
            if [ "$quote" = '"' ] && [[ ${line:$at:1} != [\\\"\$\`] ]]; then word=$word'\'; fi
            word=$word${line:$at:1} begun=1
        elif [ -n "$quote" ]; then word=$word$char
        else
            case $char in
            "'" | '"') quote=$char begun=1 ;;
            [[:space:]]) [ -z "$begun" ] || words+=("$word"); word="" begun="" ;;
            *) word=$word$char begun=1 ;;
            esac
        fi
    done
    current=$word
}
# Prints the rest of a word so that the shell takes it literally, with or without an open quote.
_mpmm_quoted() {
    local rest=$1
    # Between quotes, zsh does it itself.
    if [ -n "$quote" ] && [ -n "${ZSH_VERSION-}" ]; then printf '%s' "$rest"; return; fi
    case $quote in
    "'") printf '%s' "$rest" | sed "s/'/'\\\\''/g" ;;
    '"') printf '%s' "$rest" | sed 's/[\\"$`]/\\&/g' ;;
    *) [ -z "$rest" ] || printf '%q' "$rest" ;;
    esac
    # The shell closes the quote itself, unless the word seems to do so already.
    if [ -n "$quote" ] && [[ $rest == *"$quote" ]]; then printf '%s' "$quote"; fi
}
_mpmm() {
    # The shell replaces the second argument. bash begins a new one after each `:` and `=`, so split the line instead,
    # and keep what has already been typed as it is.
    local words quote current typed=$2 previous command="" word
    COMPREPLY=()
    _mpmm_split "${COMP_LINE:0:$COMP_POINT}" || return
    # zsh includes the quote in the argument, and does not replace it.
    typed=${typed#"$quote"}
    previous=""
    for word in "${words[@]:1}"; do
        previous=$word
        case $word in
        --) return ;;
        @COMMANDS@) [ -n "$command" ] || command=$word ;;
        esac
    done
    case $current in --*=*) previous=${current%%=*} current=${current#*=} ;; esac
    while IFS= read -r word; do
        if [[ $word == "$current"* ]]; then COMPREPLY+=("$typed$(_mpmm_quoted "${word#"$current"}")"); fi
    done < <(_mpmm_words "$command" "$previous")
}
complete -o default -F _mpmm mpmm
"""


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes the command in a shell, one of `SHELLS`."""
    return SHELLS[shell](parser)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the subcommands by name."""
    [found] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


def _help_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return what each subcommand is for."""
    [found] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {action.dest: action.help or "" for action in found._choices_actions}


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def _positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action
        for action in parser._actions
        if not action.option_strings and not isinstance(action, argparse._SubParsersAction)
    ]


def _metavar(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())


def _needs_value(action: argparse.Action) -> bool:
    """Tell whether the word after an option must be its value; if the value is optional, an option may follow."""
    return action.nargs not in (0, "?")


def _asked_for(option: argparse.Action) -> str:
    """Return which key of `_ASKED_FOR` the value of an option is, empty if none."""
    dest = {"model": "tag", "named": "namespace"}.get(option.dest, option.dest)
    return dest if dest in _ASKED_FOR else ""


def _dests(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the keys of `_ASKED_FOR` among the positional arguments of a subcommand."""
    yield from (action.dest for action in _positionals(parser) if action.dest in _ASKED_FOR)


def _bash(parser: argparse.ArgumentParser) -> str:
    """Return the script, which works in zsh, too.

    It compares and quotes the words itself: `compgen -W` would expand them, and run commands in a tag.
    """
    commands = _commands(parser)
    everywhere = " ".join(word for action in _options(parser) for word in action.option_strings)
    cases = []
    valued: dict[str, set[str]] = {"files": set(), "namespace": set(), "tag": set(), "other": set()}
    for name, command in commands.items():
        words = [word for action in _options(command) for word in action.option_strings]
        choices = [str(choice) for action in _positionals(command) for choice in action.choices or ()]
        asked = "".join(f"; {_ASKED_FOR[dest]}" for dest in _dests(command))
        cases.append(f"    {name}) printf '%s\\n' {' '.join([*words, *choices])}{asked} ;;")
        for action in _options(command):
            if _needs_value(action):
                kind = "files" if _metavar(action) in _FILES else _asked_for(action) or "other"
                valued[kind].update(action.option_strings)
    # An option that takes a file or a name in one command, and anything else in another, counts as the former.
    valued["other"] -= valued["files"] | valued["namespace"] | valued["tag"]
    return f"""\
_mpmm_words() {{
    case $2 in
    {"|".join(sorted(valued["namespace"]))}) {_NAMESPACES}; return ;;
    {"|".join(sorted(valued["tag"]))}) {_TAGS}; return ;;
    {"|".join(sorted(valued["files"] | valued["other"]))}) return ;;
    esac
    case $1 in
    "") printf '%s\\n' {" ".join(commands)} {everywhere} ;;
{chr(10).join(cases)}
    esac
}}
{_COMPLETE.lstrip().replace("@COMMANDS@", "|".join(commands))}"""


def _zsh(parser: argparse.ArgumentParser) -> str:
    return f"autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n{_bash(parser)}"


def _fish(parser: argparse.ArgumentParser) -> str:
    lines = []
    purposes = _help_of(parser)
    for action in _options(parser):
        lines.append(f"complete -c mpmm -n __fish_use_subcommand {_fish_option(action)}")
    for name, command in _commands(parser).items():
        lines.append(f"complete -c mpmm -f -n __fish_use_subcommand -a {name} -d {_quoted(purposes.get(name, ''))}")
        seen = f"complete -c mpmm -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{seen} {_fish_option(action)}" for action in _options(command)]
        lines += [f"{seen} -f {_fish_names(dest)}" for dest in _dests(command)]
        choices = [str(choice) for action in _positionals(command) for choice in action.choices or ()]
        if choices:
            lines.append(f"{seen} -f -a {_quoted(' '.join(choices))}")
    return "\n".join(lines) + "\n"


def _fish_option(action: argparse.Action) -> str:
    words = [f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}" for word in action.option_strings]
    if _needs_value(action):
        words.append("-r" if _metavar(action) in _FILES else "-x")
        asked = _asked_for(action)
        words += [_fish_names(asked)] if asked else []
    return " ".join([*words, f"-d {_quoted(_argument_help(action))}"])


def _fish_names(dest: str) -> str:
    return f"-a '({_ASKED_FOR[dest]})'".replace("'{tag}'", '"{tag}"').replace("' '", '" "')


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _argument_help(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%").replace("%(prog)s", "mpmm")


#: The function that makes the script of each shell.
SHELLS: dict[str, Callable[[argparse.ArgumentParser], str]] = {"bash": _bash, "fish": _fish, "zsh": _zsh}


def man_page(parser: argparse.ArgumentParser, version: str) -> str:
    """Return the manual page, as troff; `mpmm man | man -l -` shows it."""
    purposes = _help_of(parser)
    lines = [
        f'.TH MPMM 1 "{time.strftime("%Y-%m-%d")}" "mpmm {version}"',
        *(".SH NAME", r"mpmm \- inspect the model managers of this host, and change them"),
        *(".SH SYNOPSIS", r".B mpmm", r"[\fB\-\-runtime\-root\fR \fIFOLDER\fR] \fICOMMAND\fR ..."),
        *(".SH DESCRIPTION", _troff(parser.description or "")),
        _troff(
            "Every command takes --help. Commands that only look hardly ever take the lock, so they answer even while "
            "its holder is stopped, and delay no process. mpmm help explains settings, errors, guarantees and more."
        ),
        ".SH OPTIONS",
    ]
    lines += [line for action in _options(parser) for line in _entry(action)]
    lines.append(".SH COMMANDS")
    for name, command in _commands(parser).items():
        arguments = "".join(
            rf" \fI{_troff(_metavar(action))}\fR" if action.nargs != "?" else rf" [\fI{_troff(_metavar(action))}\fR]"
            for action in _positionals(command)
        )
        lines += [rf".SS \fB{_troff(name)}\fR{arguments}", _troff(purposes.get(name, ""))]
        for action in (*_positionals(command), *_options(command)):
            if action.help and action.dest not in ("help", "runtime_root"):
                lines += _entry(action)
    lines += [
        *(
            ".SH EXIT STATUS",
            ".TP",
            ".B 0",
            "Success.",
            ".TP",
            ".B 1",
            "A problem was found, or the request was refused.",
        ),
        *(".TP", ".B 2", "There is no namespace to look at, or the command line is not valid."),
        _troff("run exits with the status of its program, or with 125 to 127 if it could not be started."),
        ".SH ENVIRONMENT",
        *(".TP", ".B MPMM_RUNTIME_DIR", _troff("Folder of the runtime directories, /tmp/mpmm-<uid> by default.")),
        *(".TP", ".B NO_COLOR", "If set, turns off colours on a terminal; so does TERM=dumb."),
    ]
    return "\n".join(lines) + "\n"


def _entry(action: argparse.Action) -> list[str]:
    if action.option_strings:
        value = "" if action.nargs == 0 else rf" \fI{_troff(_metavar(action))}\fR"
        if action.nargs == "?":
            value = f" [{value.strip()}]"
        head = ", ".join(rf"\fB{_troff(word)}\fR" for word in action.option_strings) + value
    else:
        head = rf"\fI{_troff(_metavar(action))}\fR"
    return [".TP", head, _troff(_argument_help(action))]


def _troff(text: str) -> str:
    """Escape a text, so that troff takes no part of it for a command."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("…", "...")
    return rf"\&{text}" if text.startswith((".", "'")) else text
