"""What a frozen encoder knows: linear probes and nearest neighbours on its features, in minutes on a CPU."""
