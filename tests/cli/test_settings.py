"""Flag over variable over the project's file over the user's, and what is refused of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from one_line import is_one_line_error

from ollm_core.cli.main import cli
from ollm_core.cli.settings import settings_of, unknown_variables
from ollm_core.errors import InputError
from ollm_core.options import OPTIONS, PlanOptions

Ollm = Callable[..., tuple[int, str, str]]
VERBS = settings_of(cli)


@pytest.fixture(autouse=True)
def project(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, without a file yet, and no variable set."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    for settings in VERBS.values():
        for one in settings.values():
            monkeypatch.delenv(one.variable, raising=False)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """The user's file, private and empty."""
    path = tmp_path / "xdg/ollm/config.toml"
    path.parent.mkdir(parents=True)
    path.touch(0o600)
    return path


def shown(ollm: Ollm, verb: str, *options: str) -> list[tuple[object, str]]:
    """Value and origin of options."""
    code, out, err = ollm("config", "show", verb, "--json")
    assert code == 0, err
    found = {one["option"]: (one["value"], one["origin"]) for one in json.loads(out)["options"]}
    return [found[option] for option in options]


def test_every_option_has_a_variable_and_a_key():
    """By its declaration alone; no two share a variable."""
    declared = {name for settings in VERBS.values() for name in settings}
    with_flags = {name for name in OPTIONS if OPTIONS[name].metadata["about"].verbs}
    assert declared == with_flags | {"temperature", "top_p", "top_k", "seed"}
    variables = {key: one.variable for settings in VERBS.values() for key, one in settings.items()}
    assert len(set(variables.values())) == len(variables)
    assert (variables["kv_dir"], variables["models_dir"]) == ("OLLM_KV_DIR", "OLLM_MODELS")


def test_what_goes_over_what(ollm: Ollm, project: Path, user: Path, monkeypatch):
    """Each source in turn; a verb's table goes over the top of its file, wherever it stands."""
    key = "max_new_tokens"
    assert shown(ollm, "run", key) == [(256, "default")]
    user.write_text(f"[run]\n{key} = 2\n[plan]\n{key} = 9\n")
    assert shown(ollm, "run", key) == [(2, f"{user}:2")]
    (project / "ollm.toml").write_text(f"{key} = 3\n[ask]\n{key} = 4\n")
    assert shown(ollm, "run", key) == [(3, f"{project}/ollm.toml:1")]
    assert shown(ollm, "ask", key) == [(4, f"{project}/ollm.toml:3")]
    monkeypatch.setenv("OLLM_MAX_NEW_TOKENS", "5")
    assert shown(ollm, "ask", key) == [(5, "OLLM_MAX_NEW_TOKENS")]
    monkeypatch.setenv("OLLM_MAX_NEW_TOKENS", "")
    assert shown(ollm, "ask", key) == [(4, f"{project}/ollm.toml:3")]


def test_a_run_goes_by_them(ollm: Ollm, project: Path, chat: Path, monkeypatch):
    """The number of new tokens, by file, by variable and by flag."""

    def num_new_tokens(*flags: str) -> int:
        # fmt: off
        code, out, err = ollm("run", chat, "--raw", "--prompt", "1 2 3", "--device", "cpu",
                              "--json", *flags)
        # fmt: on
        assert code == 0, err
        return len(json.loads(out)["token_ids"])

    (project / "ollm.toml").write_text('max_new_tokens = 3\ndevice_memory = "50MB"\n')
    assert num_new_tokens() == 3
    monkeypatch.setenv("OLLM_MAX_NEW_TOKENS", "2")
    assert num_new_tokens() == 2
    assert num_new_tokens("--max-new-tokens", "1") == 1
    (project / "ollm.toml").write_text('device_memory = "1KB"\n')
    code, _, err = ollm("run", chat, "--raw", "--prompt", "1 2", "--device", "cpu")
    assert (code, "limit 1 kB" in err) == (3, True), err


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ('device_memroy = "1GB"', ":1: there is no option named 'device_memroy'", "device_memory?"),
        ("device-memory = 1", ":1: there is no option named 'device-memory'", "device_memory?"),
        ("[rnu]\nseed = 1", ": there is no table 'rnu'", "did you mean run?"),
        ("[run]\nport = 1", ":2: there is no option of `ollm run` named 'port'", "config show"),
        ("[cache]\nx = 1", ": there is no table 'cache'", ""),
        (
            "device_layers = 1.5",
            ":1: device_layers: need a whole number of at least 0, have 1.5",
            "",
        ),
        ("device_layers = true", "need a whole number of at least 0, have True", ""),
        ("device_layers = -1", ":1: device_layers: -1 is not in the range", ""),
        ('keep_kv = "no"', ":1: keep_kv: need true or false, have 'no'", ""),
        ('precision = "best"', ":1: precision: 'best' is not one of", ""),
        ("kv = 1", "kv: need one of auto, device, host, disk, or one of a plugin, have 1", ""),
        ("kv = 1979-05-27", "have datetime.date(1979, 5, 27)", ""),
        ('device_memory = "lots"', ":1: ", "8GB"),
        ("device_memory = 1000", 'need a size, for example "8GB", have 1000', ""),
        ("device_memory = [1]", 'need a size, for example "8GB", have [1]', ""),
        ('[serve]\ncontext = "far"', ":2: 'far' is not a number of tokens", "100k"),
        ("[run]\ntop_p = 2", ":2: top_p: 2.0 is not in the range", ""),
        ("run = 1", ":1: there is no option named 'run'", ""),
        ("[run.more]\nx = 1", "there is no option of `ollm run` named 'more'", ""),
        ('"\\u001b[31m\\n" = 1', r"'\x1b[31m\n'", "config show"),
    ],
)
def test_faults_of_a_file_are_one_line(
    ollm: Ollm, project: Path, content: str, message: str, hint: str
):
    """Which names the file, the line, the key, and what may be meant; whatever verb is run."""
    (project / "ollm.toml").write_text(content)
    code, out, err = ollm("run", "no-such-model")
    assert (code, out) == (2, "")
    assert is_one_line_error(err)
    assert f"{project}/ollm.toml" in err
    assert message in err
    assert hint in err


def test_help_needs_no_files(ollm: Ollm, project: Path):
    """Nor do verbs that no option is set for."""
    (project / "ollm.toml").write_text("= = =")
    assert ollm("run", "--help")[0] == ollm("--help")[0] == ollm("plugins")[0] == 0
    assert ollm("plan", "x")[0] == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trust_remote_code", "true"),
        ("host", '"0.0.0.0"'),
        ("api_key", '"known-to-them"'),
        ("allowed_hosts", '"evil.example"'),
        ("allowed_origins", '"https://evil.example"'),
        ("files_dir", '"files"'),
        ("kv_dir", '"kv"'),
        ("kv_budget", '"1MB"'),
        ("models_dir", '"models"'),
    ],
)
@pytest.mark.parametrize("table", [False, True])
def test_a_project_cannot_open_doors(
    ollm: Ollm, project: Path, user: Path, key: str, value: str, table: bool
):
    """What runs code, opens a server or names a directory is the user's to say, who is told how.
    The user's own file may.
    """
    verb = next(verb for verb, settings in VERBS.items() if key in settings)
    text = (f"[{verb}]\n" if table else "") + f"{key} = {value}\n"
    (project / "ollm.toml").write_text(text)
    for arguments in ([verb, "x"], ["config", "show"]):
        code, out, err = ollm(*arguments)
        assert (code, out) == (2, "")
        assert f"{key} is not taken from a project's file" in err
        assert f"--{key.replace('_', '-')}, {VERBS[verb][key].variable}, {user}" in err
        assert value.strip('"') not in err or key == "models_dir" or key in ("kv_dir", "files_dir")
    (project / "ollm.toml").unlink()
    user.write_text(text)
    [(_, origin)] = shown(ollm, verb, key)
    assert origin == f"{user}:{2 if table else 1}"


def test_every_option_that_opens_doors_is_known():
    """A new one is thought about: it stands here, or it is the user's alone."""
    harmless = {
        "device", "dtype", "device_memory", "host_memory", "device_layers", "host_layers", "kv",
        "precision", "attention", "chunk_size", "keep_kv", "reader", "draft", "draft_model",
        "num_draft_tokens", "context", "batch", "max_new_tokens", "port", "max_requests",
        "max_body", "files_budget", "max_connections", "temperature", "top_p", "top_k", "seed",
        "keep_budget", "keep_seconds",  # of answers in memory, which go with the server
    }  # fmt: skip
    free = {
        key
        for settings in VERBS.values()
        for key, one in settings.items()
        if not one.known.user_only
    }
    assert free == harmless


def test_a_key_is_never_shown(ollm: Ollm, user: Path, monkeypatch):
    """Wherever it comes from, and whatever is wrong with it."""
    user.write_text('[serve]\napi_key = "sword-fish"\n')
    assert shown(ollm, "serve", "api_key") == [("(set, not shown)", f"{user}:2")]
    assert "sword-fish" not in "".join(ollm("config", "show", "--origin")[1:])
    user.write_text('api_key = ["sword-fish"]')
    code, out, err = ollm("serve", "x")
    assert (code, "api_key: need text" in err, "sword" in out + err) == (2, True, False)
    user.write_text('api_key = "sword fish"')
    code, out, err = ollm("serve", "x", "--debug")
    assert (code, "at least 8 ASCII" in err, "sword" in out + err) == (2, True, False)
    user.write_text('api_key = "sword-fish"')
    user.chmod(0o640)
    assert "other users can read the file" in ollm("serve", "x")[2]
    user.write_text("")
    monkeypatch.setenv("OLLM_API_KEY", "sword fish")
    code, out, err = ollm("config", "show")
    assert (code, "OLLM_API_KEY: " in err, "sword" in out + err) == (2, True, False)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OLLM_DEVICE_LAYERS", "many", "OLLM_DEVICE_LAYERS"),
        ("OLLM_DEVICE_MEMORY", "lots", "OLLM_DEVICE_MEMORY: 'lots'"),
        ("OLLM_KV", "tape", "OLLM_KV: there is no KV store 'tape'"),
        ("OLLM_KEEP_KV", "perhaps", "OLLM_KEEP_KV"),
        ("OLLM_TRUST_REMOTE_CODE", "perhaps", "OLLM_TRUST_REMOTE_CODE"),
        ("OLLM_PRECISION", "best", "OLLM_PRECISION"),
    ],
)
def test_faults_of_a_variable_name_it(
    ollm: Ollm, monkeypatch, variable: str, value: str, message: str
):
    """In one line."""
    monkeypatch.setenv(variable, value)
    code, out, err = ollm("run", "x", "--prompt", "hi")
    assert (code, out) == (2, "")
    assert is_one_line_error(err)
    assert message in err


def test_switches_in_variables(ollm: Ollm, monkeypatch):
    """Words that people write for on and off."""
    for word, value in (("1", True), ("true", True), ("yes", True), ("0", False), ("off", False)):
        monkeypatch.setenv("OLLM_KEEP_KV", word)
        monkeypatch.setenv("OLLM_TRUST_REMOTE_CODE", word)
        found = shown(ollm, "run", "keep_kv", "trust_remote_code")
        assert [one for one, _ in found] == [value, value]


def test_directories_of_a_file_are_beside_it(ollm: Ollm, user: Path, monkeypatch):
    """Relative ones; `~` is home."""
    user.write_text('kv_dir = "kv"\nfiles_dir = "~/files"\n')
    [(kv_dir, _)] = shown(ollm, "serve", "kv_dir")
    [(files_dir, _)] = shown(ollm, "serve", "files_dir")
    assert kv_dir == str(user.parent / "kv")
    assert files_dir == str(Path.home() / "files")


def test_a_kv_store_of_a_plugin_is_taken_in_a_file(ollm: Ollm, project: Path):
    """Where it is not there the line is named."""
    (project / "ollm.toml").write_text('kv = "tape"')
    code, _, err = ollm("run", "x", "--prompt", "hi")
    assert code == 2
    assert f"{project}/ollm.toml:1: kv: there is no KV store 'tape'" in err


def test_misspelled_variables_are_told(ollm: Ollm, monkeypatch):
    """By `ollm config show`; what resembles none is somebody else's."""
    monkeypatch.setenv("OLLM_DEVICE_MEMROY", "1GB")
    monkeypatch.setenv("OLLM_LOAD_PLUGINS", "ollm-adapter-llama")
    monkeypatch.setenv("OLLM_QQ", "")
    assert unknown_variables(VERBS) == {"OLLM_DEVICE_MEMROY": "OLLM_DEVICE_MEMORY"}
    assert "did you mean OLLM_DEVICE_MEMORY?" in ollm("config", "show")[2]


def test_a_flag_takes_the_sense_of_what_a_file_says(
    ollm: Ollm, project: Path, user: Path, chat: Path
):
    """Greedy with a file's top_p, no draft with its draft model, no kept cache with its budget:
    what means nothing then is passed over. As a flag it is refused, as ever.
    """
    (project / "ollm.toml").write_text(
        'temperature = 0.5\ntop_p = 0.9\nseed = 1\ndraft = "lookup"\nnum_draft_tokens = 3\n'
        'draft_model = "no-such-model"\ndevice = "cpu"\nmax_new_tokens = 2\n'
    )
    user.write_text('kv_budget = "1GB"\n')
    plain = ["run", chat, "--raw", "--prompt", "1 2 3", "--json"]
    for flags in ([], ["--temperature", "0"], ["--draft", "none", "--temperature", "0"]):
        code, _, err = ollm(*plain, *flags)
        assert code == 0, err
    assert "needs" in ollm(*plain, "--temperature", "0", "--top-p", "0.5")[2]
    assert "needs" in ollm(*plain, "--draft", "none", "--num-draft-tokens", "2")[2]
    assert "kv_budget: need a kv_dir" in ollm(*plain, "--kv-budget", "1GB")[2]


@pytest.mark.parametrize(
    ("told", "flags", "expected"),
    [
        ('precision = "exact"', [], ("exact", "exact")),
        ('precision = "exact"', ["--attention", "blockwise"], ("fast", "blockwise")),
        ('precision = "exact"', ["--attention", "exact"], ("exact", "exact")),
        ('attention = "exact"', ["--precision", "fast"], ("fast", "auto")),
        ('attention = "blockwise"', ["--precision", "fast"], ("fast", "blockwise")),
        ('attention = "exact"', [], ("exact", "exact")),
    ],
)
def test_a_flag_goes_over_what_a_file_says_of_its_pair(
    ollm: Ollm, project: Path, monkeypatch, told: str, flags: list[str], expected: tuple[str, str]
):
    """Precision and attention go by each other."""
    given = {}

    def stop(model: str, **options: object) -> None:
        given.update(options)
        raise InputError("seen")

    monkeypatch.setattr("ollm_core.planning.planner.plan", stop)
    (project / "ollm.toml").write_text(told)
    assert "seen" in ollm("plan", "smollm2-135M", *flags)[2]
    options = PlanOptions(**given)
    assert (options.precision, options.attention) == expected
