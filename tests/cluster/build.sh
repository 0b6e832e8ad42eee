#!/bin/bash
# Builds a Kubernetes control plane for the tests out of Debian's own packages, on Debian 12.
#
# usage: build.sh WORK OUT
#   WORK  an empty folder with 5 GB of room; the caller removes it
#   OUT   gets etcd, kube-apiserver, kube-controller-manager, kubectl, apiextensions-apiserver, VERSIONS
#
# Any user may run it. It installs nothing and leaves the system's apt state alone: it has apt
# sources, lists, status and cache of its own. The archive is the one this machine uses already.
# Two servers, because no Debian package holds a current kube-apiserver:
#   A  the core API, Kubernetes 1.20, from the source package `kubernetes`
#   B  custom resources as Kubernetes 1.36 serves them, from the Go library packages of unstable
# Called by binaries.py, which holds the lock and moves OUT into the cache.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
W=$(mkdir -p "$1" && realpath "$1")
OUT=$(mkdir -p "$2" && realpath "$2")
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
BEGAN=$(date +%s)

stage() { echo "control plane [$(($(date +%s) - BEGAN)) s] $*" >&2; }
fail() { echo "control plane: $*" >&2; exit 1; }

archive() {
  local uris
  uris=$(cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null |
    sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[.*\] \)\?\([^ ]*\) .*/\2/p')
  grep -m1 '/debian/\?$' <<<"$uris" || true
}

# in_suite SUITE TOOL ARGUMENT...: an apt tool that sees that suite and nothing of this system
in_suite() {
  local suite=$1 tool=$2 root=$W/apt-$1
  shift 2
  if [ ! -d "$root" ]; then
    mkdir -p "$root/lists/partial" "$root/cache/archives/partial" "$root/parts"
    : >"$root/status"
    # unstable is whatever the archive has today; its date says nothing about us
    echo "deb [signed-by=$KEYRING check-valid-until=no] $ARCHIVE $suite main" >"$root/list"
    echo "deb-src [signed-by=$KEYRING check-valid-until=no] $ARCHIVE bookworm main" >>"$root/list"
    [ "$suite" = bookworm ] || sed -i '$d' "$root/list"
  fi
  "$tool" -q -o Dir::Etc::SourceList="$root/list" -o Dir::Etc::SourceParts="$root/parts" \
    -o Dir::State="$root" -o Dir::State::Lists="$root/lists" -o Dir::State::status="$root/status" \
    -o Dir::Cache="$root/cache" -o Acquire::Languages=none \
    -o APT::Sandbox::User="$(id -un)" "$@"
}

# require SUITE PACKAGE...: say which package is gone before anything is downloaded
require() {
  local suite=$1 package gone=()
  shift
  local known
  known=$(in_suite "$suite" apt-cache pkgnames | sort -u)
  for package in "$@"; do
    grep -qxF -- "$package" <<<"$known" || gone+=("$package")
  done
  [ ${#gone[@]} -eq 0 ] || fail "the $suite suite has no package ${gone[*]} (any more)." \
    "Look for its new name in the archive, change tests/cluster/build.sh or" \
    "tests/cluster/unstable-packages.txt, and raise RECIPE in tests/cluster/binaries.py." \
    "Or set KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver."
}

unpack() {
  local root=$1 package
  mkdir -p "$root"
  for package in "${@:2}"; do
    dpkg-deb -x "$package" "$root"
    dpkg-deb -W --showformat='${Package} ${Version}\n' "$package" >>"$OUT/VERSIONS"
  done
}

build_core() { # server A, its controller manager and etcd
  local packages="golang-1.19-go golang-1.19-src make etcd-server golang-github-modern-go-reflect2-dev"
  local root=$W/a/root source reflect2
  mkdir -p "$W/a" && cd "$W/a"
  stage "server A: download"
  # shellcheck disable=SC2086
  require bookworm $packages
  # shellcheck disable=SC2086
  in_suite bookworm apt-get download $packages >"$W/log" 2>&1 || { cat "$W/log" >&2; fail "download"; }
  in_suite bookworm apt-get source --download-only kubernetes >"$W/log" 2>&1 ||
    { cat "$W/log" >&2; fail "download of the source package kubernetes"; }
  unpack "$root" ./*.deb
  tar xf kubernetes_*.orig.tar.gz
  source=$(echo "$W"/a/kubernetes-*/) && source=${source%/}
  basename "$source" >>"$OUT/VERSIONS"
  # the vendored reflect2 dies of SIGSEGV under Go 1.19 at the first custom resource
  reflect2=$source/vendor/github.com/modern-go/reflect2
  rm -f "$reflect2"/*.go "$reflect2"/*.s
  cp "$root"/usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} "$reflect2/"
  mkdir -p "$source/.go/src/k8s.io" && ln -sfn "$source" "$source/.go/src/k8s.io/kubernetes"
  # make copies its own tools by "rsync -pc FILE FOLDER", all it wants of rsync
  command -v rsync >/dev/null || {
    printf '#!/bin/sh\nexec cp -p "$2" "$3"\n' >"$root/usr/bin/rsync"
    chmod +x "$root/usr/bin/rsync"
  }
  stage "server A: build (about 4 minutes on 2 cores)"
  # the make target, not `go build`: it generates the OpenAPI code
  (cd "$source/.go/src/k8s.io/kubernetes" &&
    env PATH="$root/usr/lib/go-1.19/bin:$root/usr/bin:$PATH" GOPATH="$source/.go" \
      GOROOT="$root/usr/lib/go-1.19" CGO_ENABLED=0 HOME="$W" \
      make WHAT="cmd/kube-apiserver cmd/kube-controller-manager") >"$W/log" 2>&1 ||
    { tail -40 "$W/log" >&2; fail "server A did not build"; }
  cp "$source"/_output/local/bin/linux/*/kube-{apiserver,controller-manager} "$root/usr/bin/etcd" "$OUT/"
}

build_custom_resources() { # server B and kubectl
  local packages root=$W/b/root
  packages="golang-1.26-go golang-1.26-src kubectl $(tr '\n' ' ' <"$HERE/unstable-packages.txt")"
  mkdir -p "$W/b" && cd "$W/b"
  stage "server B: download"
  # shellcheck disable=SC2086
  require unstable $packages
  # shellcheck disable=SC2086
  in_suite unstable apt-get download $packages >"$W/log" 2>&1 || { cat "$W/log" >&2; fail "download"; }
  unpack "$root" ./*.deb
  stage "server B: build (about 2 minutes on 2 cores)"
  env GO111MODULE=off GOTOOLCHAIN=local CGO_ENABLED=0 GOPATH="$root/usr/share/gocode" \
    GOROOT="$root/usr/lib/go-1.26" GOCACHE="$W/b/gocache" HOME="$W" \
    "$root/usr/lib/go-1.26/bin/go" build -o "$OUT/apiextensions-apiserver" \
    k8s.io/apiextensions-apiserver >"$W/log" 2>&1 || {
    tail -40 "$W/log" >&2
    fail "server B did not build: 'cannot find package' above names a library that moved to" \
      "another package of the unstable suite; add that to tests/cluster/unstable-packages.txt"
  }
  cp "$root/usr/bin/kubectl" "$OUT/"
}

ARCHIVE=${DEBIAN_MIRROR:-$(archive)}
[ -n "$ARCHIVE" ] || fail "no Debian archive in this machine's apt sources; set DEBIAN_MIRROR"
ARCHIVE=${ARCHIVE%/}
: >"$OUT/VERSIONS"
for suite in bookworm unstable; do
  stage "package lists of $suite"
  in_suite "$suite" apt-get update >"$W/log" 2>&1 || { cat "$W/log" >&2; fail "apt-get update"; }
done
build_core
build_custom_resources
stage "done"
