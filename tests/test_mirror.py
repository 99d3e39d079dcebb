"""Tests mirror the folders of `ollm_core`: those of a module stand in the file of its name, in the
folder of its name, and may have files of their own for a part, `test_MODULE_PART.py`.
"""

from __future__ import annotations

from pathlib import Path

from test_imports import FILES, ROOT

TESTS = Path(__file__).parent
TO_BE_TESTED = {
    path.relative_to(ROOT).with_suffix("").as_posix()
    for path in FILES
    if not path.stem.startswith("__")
}

ELSEWHERE = {
    # what has no code of its own to try: names, data, abstract classes and thin faces
    "api": "test_loader.py",
    "attention/options": "attention/test_kernels.py",
    "cli/kept": "cli/test_cache.py",
    "cli/options": "test_options.py",
    "contracts/adapter": "plugins/test_decoder.py",
    "contracts/attention": "attention/test_exact.py",
    "contracts/drafting": "drafting/test_lookup.py",
    "contracts/model": "model/test_spec.py",
    "contracts/progress": "engine/test_counters.py",
    "contracts/weights": "weights/test_streamer.py",
    "files/remembered": "model/test_fingerprint.py",
    "kv/block_storage": "kv/test_block_table.py",
    "kv/block_store": "kv/test_block_table.py",
    "kv/disk/sizes": "kv/disk/test_storage.py",
    "option_fields": "test_options.py",
    "planning/plan": "planning/test_planner.py",
    "server/answering": "server/test_openai.py",
    "server/errors": "server/test_app.py",
    "server/kept_routes": "server/test_kept.py",
    "server/response_bodies": "server/test_responses.py",
    "server/response_events": "server/test_responses.py",
    "server/meter": "server/test_metrics.py",
    "plugins/hookspecs": "plugins/test_loader.py",
    "products/weight": "products/test_products.py",
    # what a pass goes through: tested as the whole that it is part of
    "engine/layer_call": "test_exact.py",
    "engine/own_cache": "model/test_follow_forward.py",
    "engine/own_pass": "model/test_follow_forward.py",
    "engine/own_call": "model/test_follow_forward.py",
    "engine/recurrent_call": "engine/test_engine.py",
    "engine/traced_cache": "engine/test_activations.py",
    "engine/weight_pass": "engine/test_engine.py",
    "generate/hooks": "generate/test_surface.py",
    "generate/limits": "generate/test_causal_lm.py",
    "generate/opened": "generate/test_causal_lm.py",
    "attention/own_layer": "model/test_blockwise_probe.py",
    "model/attention_probe": "model/test_blockwise_probe.py",
    "model/layer_memory": "model/test_follow_forward.py",
    "model/mask_probe": "model/test_blockwise_probe.py",
    "model/own_forward": "model/test_follow_forward.py",
    "model/own_skeleton": "model/test_follow_forward.py",
    "model/skeleton": "test_exact.py",
    "drafting/candidates": "drafting/test_lookup.py",
    "drafting/text_drafts": "drafting/test_lookup.py",
    "serving/admission": "serving/test_scheduler.py",
    "serving/jobs/rows": "serving/jobs/test_job.py",
    "serving/jobs/settings": "cli/test_batch.py",
    "serving/live": "serving/test_scheduler.py",
    "serving/model": "serving/test_scheduler.py",
    "serving/offline": "serving/test_scheduler.py",
    "serving/openai/fields": "server/test_openapi.py",
    "serving/openai/limits": "serving/openai/test_served.py",
    "serving/openai/refused": "serving/openai/test_requests.py",
    "serving/prefixes": "serving/test_scheduler.py",
    "serving/texts": "serving/test_scheduler.py",
    # halves of what is tested at its face
    "calibration/timing": "calibration/test_products.py",
    "checkpoint/hub_download": "checkpoint/test_hub.py",
    "checkpoint/hub_refusals": "checkpoint/test_hub.py",
    "cli/conversation": "cli/test_chat.py",
    "cli/documents": "cli/test_ask.py",
    "cli/sampling": "cli/test_run.py",
    "cli/offered": "plugins/test_commands.py",
    "cli/timeline": "cli/test_plan.py",
    "convert/writer": "convert/test_compress.py",
    "device/memory": "device/test_two_memories.py",
    "documents/extracted": "documents/test_docx_text.py",
    "documents/process": "documents/test_reading.py",
    "kv/disk/admin": "cli/test_cache.py",
    "kv/disk/borrowing": "kv/disk/test_borrowed.py",
    "kv/disk/held_pass": "kv/disk/test_checkpoints.py",
    "kv/disk/inventory": "cli/test_cache.py",
    "kv/disk/layer_file": "kv/disk/test_storage.py",
    "kv/disk/read_ahead": "kv/disk/test_storage.py",
    "kv/factory": "kv/disk/test_directory.py",
    "kv/simulated": "planning/test_dry_run.py",
    "kv/simulated_storage": "planning/test_dry_run.py",
    "planning/advisor": "planning/test_planner.py",
    "plugins/limited": "model/test_follow_forward.py",
    "products/compiled": "products/test_products.py",
    "products/small_batch": "products/test_products.py",
    "products/trial": "products/test_select.py",
    "text/control_tokens": "text/test_chat.py",
    "text/tool_forms": "text/test_tool_calls.py",
    "text/template_process": "text/test_templates.py",
    "weights/sources/page_aligned": "weights/sources/test_posix.py",
}
"""Modules without a test file of their name, and the file that tests them."""

WHOLE = {
    "attention/test_soft_caps.py": "a family whose attention does more",
    "device/test_two_memories.py": "whole models on a device with memory of its own",
    "kv/test_sliding_models.py": "whole models whose layers slide",
    "plugins/test_commands.py": "verbs of plugins",
    "test_exact.py": "promise 1",
    "test_fuzz.py": "damaged files of all kinds",
    "test_imports.py": "the order of all folders",
    "test_main_path.py": "from load to a layer's call",
    "test_mirror.py": "this",
    "test_new_adapter.py": "ollm adapter new",
    "test_template.py": "the template that it uses",
}
"""Test files that are of no one module, and what they are of."""

OTHER_FOLDERS = {"benchmarks", "docs", "examples", "gpu"}
"""What these mirror lies beside `ollm_core`, and the last one needs a GPU."""


def all_tests():
    """Every test file, below this directory."""
    return sorted(path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))


def module_of(file):
    """The module that a test file is named after, or None."""
    module = file.with_name(file.stem.removeprefix("test_")).as_posix()
    folder = f"{file.parent.as_posix()}/".removeprefix("./")
    named = [
        name
        for name in TO_BE_TESTED
        if name.startswith(folder)
        and "/" not in name.removeprefix(folder)
        and (module == name or module.startswith(f"{name}_"))
    ]
    return max(named, key=len, default=None)


def test_every_test_file_is_named_after_a_module():
    """Or stands in WHOLE, which has no others."""
    files = [file for file in all_tests() if file.parts[0] not in OTHER_FOLDERS]
    nameless = {file.as_posix() for file in files if module_of(file) is None}
    assert not nameless - WHOLE.keys(), "name it after what it tests, or say in WHOLE what that is"
    assert not WHOLE.keys() - nameless, "it is not there, or named after a module: no exception"


def test_every_module_has_a_test_file_of_its_name():
    """Or stands in ELSEWHERE, which has no others."""
    without = TO_BE_TESTED - {module_of(file) for file in all_tests()}
    assert not without - ELSEWHERE.keys(), "write tests, or say in ELSEWHERE which ones try it"
    assert not ELSEWHERE.keys() - without, "it is gone, or has tests of its name: no exception"


def test_what_tests_them_is_there():
    """Each file in ELSEWHERE, which a renaming would leave behind."""
    assert [file for file in ELSEWHERE.values() if not (TESTS / file).is_file()] == []
