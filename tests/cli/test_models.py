"""`ollm list-models`."""

import json


def test_list_models(ollm, tiny_chat):
    """Every model of the catalog has a line, and the same fields as JSON."""
    code, out, err = ollm("list-models", "--json", "--models-dir", tiny_chat.parent)
    assert (code, err) == (0, "")
    models = {model["id"]: model for model in json.loads(out)["models"]}
    assert models["smollm2-135M"]["adapter"] == "llama"
    assert models["smollm2-135M"]["distribution"] == "ollm-adapter-llama"
    assert not models["llama3-8B-chat"]["on_disk"]
    assert models[tiny_chat.name]["on_disk"]
    _, out, _ = ollm("list-models", "--models-dir", tiny_chat.parent)
    assert [line.split()[0] for line in out.split("\n\n")[0].splitlines()] == ["MODEL", *models]
