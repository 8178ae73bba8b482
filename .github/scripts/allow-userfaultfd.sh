#!/usr/bin/env bash
# KVM's faults come from the kernel, and a userfaultfd that sees those needs a right of its own.
set -euo pipefail

sudo sysctl -w vm.unprivileged_userfaultfd=1
if [ -e /dev/userfaultfd ]; then
    sudo chmod 0666 /dev/userfaultfd
    ls -l /dev/userfaultfd
fi
