#!/usr/bin/env bash
# Lets everybody on this runner use KVM: /dev/kvm belongs to group kvm, which the runner's user is not in.
set -euo pipefail

if [ ! -e /dev/kvm ]; then
    echo "no /dev/kvm: this runner has no nested virtualisation; use the job without KVM" >&2
    exit 1
fi
echo 'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"' |
    sudo tee /etc/udev/rules.d/99-kvm4all.rules
sudo udevadm control --reload-rules
sudo udevadm trigger --name-match=kvm
sudo udevadm settle
ls -l /dev/kvm
