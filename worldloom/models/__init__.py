"""World models: DreamerV3."""
