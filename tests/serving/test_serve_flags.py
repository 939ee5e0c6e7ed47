"""From flags and files to a server's settings; what cannot be served is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from soul.cli import run_command
from soul.serving.settings import Hosting, Limits, Replicas, ServeConfig
from tests.serving_runs import write_run


def serve(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = run_command("serve", list(words))
    return code, capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "x")


def test_build_writes_what_serve_deploy_reads(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve_schema = pytest.importorskip("ray.serve.schema")
    file = tmp_path / "serve.yaml"
    code, _ = serve(capsys, f"nice={run}", "--alias", "production=nice", "--replicas", "2", "--port", "9001", "--build", str(file))
    assert code == 0
    document = yaml.safe_load(file.read_text())
    app = serve_schema.ServeDeploySchema.model_validate(document).applications[0]
    assert document["http_options"] == {"host": "127.0.0.1", "port": 9001}
    assert ServeConfig.model_validate(app.args).replicas.minimum == 2
    for deployment in app.deployments:
        hosting = Hosting.model_validate(deployment.user_config)
        assert hosting.runs == {"nice": str(run)} and hosting.aliases == {"production": "nice"}
    assert file.read_text().count(str(run)) == 1  # one place to change
    module, _, name = app.import_path.partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to serve"),
        (["nowhere"], "is no folder"),
        (["a=x", "a=y"], "two runs would be called a"),
        (["x", "--port", "70000"], "--port"),
        (["x", "--host", "0.0.0.0"], "no API key"),
        (["x", "--alias", "production"], "NAME=ID"),
        (["x", "--replicas", "0"], "--replicas"),
        (["x", "--api-key-file", "nowhere"], "cannot be read"),
        (["x", "--config", "some.yaml"], "write it there"),
        (["a..b=x"], "two dots"),
        (["a b=x"], "hosting.runs"),
        (["x", "--repilcas", "2"], "Did you mean --replicas"),
    ],
)
def test_bad_input_is_told_before_ray_starts(
    run: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    monkeypatch.delenv("SOUL_API_KEYS", raising=False)
    code, error = serve(capsys, *words)
    assert code == 2 and says in error
    assert "Traceback" not in error


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="at least"):
        Replicas(minimum=3, maximum=2)
    with pytest.raises(ValueError, match="must not exceed"):
        Limits(max_new_tokens=10)
    with pytest.raises(ValueError, match="at least 1 item"):
        Hosting.model_validate({"policy": {"forget_metrics": []}})
