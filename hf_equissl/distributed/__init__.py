"""What several processes do together: exchanges with gradient, agreements, engines, signals."""
