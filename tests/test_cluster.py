"""cluster.yaml against Ray's own schema, as `ray up` would read it."""

from pathlib import Path

import yaml


def test_cluster_yaml_is_valid():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    workers = config["available_node_types"]["gpu"]
    assert workers["min_workers"] == 0
    assert workers["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
