"""The reading loop behind the `infiniretri` method: sentences, scores, loop; the method itself only captures."""
