"""What a method is and what it may see and say: calls, selections, reweighting, reports. Knows no model library."""
