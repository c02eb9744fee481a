"""What the `flux` method routes with: the learned router and its pooling."""
