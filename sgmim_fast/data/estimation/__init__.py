"""Structure maps from images by a pretrained depth estimator, for ``sgmim structure-maps``."""
