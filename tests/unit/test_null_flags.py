"""Flags that set something to null."""

from sdxs_lightning.null_flags import nulls_as_configs


def test_null_becomes_a_config_in_its_place_and_the_rest_stays() -> None:
    given = [
        "--config",
        "a.yaml",
        "--model.x.y=null",
        "--data.z",
        "null",
        "--ckpt_path",
        "last",
        "--a.b",
        "1",
        "--c.d=nullify",
    ]
    assert nulls_as_configs(given) == [
        "--config",
        "a.yaml",
        '--config={"model": {"x": {"y": null}}}',
        '--config={"data": {"z": null}}',
        "--ckpt_path",
        "last",
        "--a.b",
        "1",
        "--c.d=nullify",
    ]
