#!/bin/sh
# Gets Fashion-MNIST from Debian's package dataset-fashion-mnist, for machines that reach nothing but
# their package archive: installed if we are root, otherwise unpacked into the cache, where
# jaxprune.data.load looks for it. Does nothing on other systems, or where the data already is.
# Never fails: if there is no data in the end, `load` says what to do.

package=dataset-fashion-mnist
folder=usr/share/datasets/fashion-mnist
cache=${XDG_CACHE_HOME:-$HOME/.cache}/jaxprune
last=t10k-labels-idx1-ubyte

for tool in apt-get dpkg-deb; do
    command -v $tool >/dev/null || exit 0
done
for file in "$cache/fashion_mnist/$last" "/$folder/$last.gz" "$cache/debian/$folder/$last.gz"; do
    [ -e "$file" ] && exit 0
done

work=$(mktemp -d) || exit 0
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
log=$work/log

quiet_apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::http::Timeout=10 -o Acquire::Retries=1 \
        -o DPkg::Lock::Timeout=60 "$@" >>"$log" 2>&1 </dev/null
}

if [ "$(id -u)" = 0 ]; then
    echo "installing Debian's package $package"
    quiet_apt update
    quiet_apt install -y --no-install-recommends $package && exit 0
else
    echo "unpacking Debian's package $package into $cache"
fi

# Here we may not install. The machine's package lists will do if there are any; otherwise we fetch
# our own.
cd "$work" || exit 0
quiet_apt download $package || {
    mkdir -p lists/partial
    set -- -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work"
    quiet_apt "$@" update
    quiet_apt "$@" download $package
}
new=$cache/debian.$$
if mkdir -p "$cache" && dpkg-deb -x ./*.deb "$new" >>"$log" 2>&1; then
    rm -rf "$cache/debian"
    mv "$new" "$cache/debian"
else
    echo "Debian's package $package cannot be had: $(grep '^E:' "$log" | tail -n 1)"
    rm -rf "$new"
fi
exit 0
