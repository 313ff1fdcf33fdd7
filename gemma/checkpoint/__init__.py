"""The state outside the devices: checkpoints on disk, snapshots on their way to host memory, checksums of both."""
