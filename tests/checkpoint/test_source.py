"""Where models come from: each thing that can be wrong with a name has a sentence of its own."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from gemma_jax.checkpoint.source import resolve
from gemma_jax.errors import InputError, UsageError


def refusal(kind):
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    "error, token, sentence",
    [
        (lambda: refusal(errors.GatedRepoError), None, "needs a token.*hf auth login"),
        (lambda: refusal(errors.GatedRepoError), "hf_x", "is gated.*accept the model's terms"),
        (lambda: refusal(errors.RepositoryNotFoundError), None, "no model on the hub named"),
        (lambda: refusal(errors.RevisionNotFoundError), None, "no revision 'v9'"),
        (lambda: errors.OfflineModeIsEnabled("offline"), None, "cannot be downloaded.*offline"),
        (lambda: ConnectionError("no route"), None, "cannot be downloaded.*no route"),
    ],
)
def test_each_refusal_of_the_hub_has_its_sentence(monkeypatch, error, token, sentence):
    def refuse(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(InputError, match=sentence):
        resolve("owner/model", "v9")


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    files = ["model-00001-of-00002.safetensors", "pytorch_model.bin", "model.gguf"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *a, **k: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/model", "main") == tmp_path
    assert asked["name"] == "owner/model" and asked["revision"] == "main"
    assert "*.safetensors" in asked["allow_patterns"] and "*.bin" not in asked["allow_patterns"]
    files.pop(0)
    resolve("owner/model")
    assert "*.bin" in asked["allow_patterns"]


@pytest.mark.parametrize("path", ["./nowhere", "a/b/c", "/no/where", "~/nowhere/at/all"])
def test_a_path_is_never_looked_up_on_the_hub(monkeypatch, path):
    monkeypatch.setattr(huggingface_hub, "list_repo_files", pytest.fail)
    with pytest.raises(InputError, match="does not exist"):
        resolve(path)


def test_a_file_or_a_revision_of_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        resolve(tmp_path / "file")
    with pytest.raises(UsageError, match="--revision"):
        resolve(tmp_path, "main")
