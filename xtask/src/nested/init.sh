#!/bin/sh
# PID 1 of the nested machine: makes it a Linux that a test can live in, runs /nowait/command with its
# output on virtio ports (the serial line is the kernel's own), sends the results out, powers off.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo '+cpu +io +memory +pids' > /sys/fs/cgroup/cgroup.subtree_control
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
ip link set lo up

while read -r module; do
    insmod "/lib/modules/$module" || echo "nowait: cannot load module $module" > /dev/console
done < /lib/modules/order

# A port's device appears a moment after its driver. $1: the port's number.
wait_for_port() {
    tries=0
    while [ ! -c "/dev/vport0p$1" ] && [ $tries -lt 500 ]; do
        usleep 10000
        tries=$((tries + 1))
    done
}
wait_for_port 4
if [ ! -c /dev/vport0p4 ]; then
    echo 'nowait: no virtio ports' > /dev/console
    poweroff -f
fi

# shellcheck source=/dev/null
. /nowait/environment
cd /root || poweroff -f
if [ -c /dev/hvc0 ]; then
    stty rows "$LINES" cols "$COLUMNS" < /dev/hvc0
    setsid -c sh /nowait/command < /dev/hvc0 > /dev/hvc0 2>&1
    status=$?
else
    # Pipes, so that /dev/stdout and /dev/stderr can be opened; what empties them survives the TERM below.
    mkfifo /run/stdout /run/stderr
    (trap '' TERM; exec cat /run/stdout > /dev/vport0p1) &
    stdout=$!
    (trap '' TERM; exec cat /run/stderr > /dev/vport0p2) &
    stderr=$!
    stdin=/dev/null
    if [ -n "$NOWAIT_STDIN" ]; then
        unset NOWAIT_STDIN
        wait_for_port 5
        stdin=/run/stdin
        mkfifo $stdin
        # Read before the other end is known, a port is at its end: a byte comes first, from the same opening.
        (
            exec 5< /dev/vport0p5 > /run/stdin
            until dd bs=1 count=1 <&5 2> /dev/null | wc -c | grep -q 1; do usleep 10000; done
            exec cat <&5
        ) &
    fi
    # A line from outside asks for the command's end. In the foreground, for in the background a shell has it
    # ignore SIGINT.
    (read -r _ < /dev/ttyS0 && kill -TERM -- "-$(cat /run/command)") &
    setsid sh -c 'echo $$ > /run/command; exec sh /nowait/command' < $stdin > /run/stdout 2> /run/stderr
    status=$?
    # Processes left over still hold the pipes: at most 2 s for them.
    kill -TERM -1
    (sleep 2; kill -KILL -1) &
    last=$!
    wait $stdout $stderr
    kill -KILL $last
fi
tar -cf /dev/vport0p3 -C /results .
echo $status > /dev/vport0p4
poweroff -f
