"""What the exchange costs, beside what people would use instead; run from the root of the clone."""
