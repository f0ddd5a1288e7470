"""What several test suites share: fakes that stall where they are told, a small world, a small client."""
