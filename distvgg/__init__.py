"""distvgg trains VGG image classifiers over any number of processes, exactly."""
