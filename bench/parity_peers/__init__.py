"""The parts of bench/parity.py: what is compared, our side, the peers' sides, the page."""
