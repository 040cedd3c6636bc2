// Command kv is a replicated key-value service: the demonstration of package
// raft and the example to copy.
//
//	go run ./examples/kv                   three nodes in one process, with a page
//	go run ./examples/kv -dir DATA         the same, with data that stays
//	go run ./examples/kv -id a -peers ...  one node of a cluster of processes
//
// store.go is the state machine, api.go and watch.go the service over HTTP,
// package client its client with requests that take effect once, cluster.go
// starts and stops nodes, members.go adds and removes them, network.go
// partitions them, page.go and page.html are the status page.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"example.com/raft"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// options are the command line.
type options struct {
	dir     string
	port    int
	verbose bool
	leases  bool

	id, listen, http, peers string
	members                 []raft.Member // of peers
}

const usage = `kv is a key-value service replicated by Raft.

  kv                    three nodes in this process, data in a temporary directory
  kv -dir DATA          the same; the data stays, and the ports are always the same
  kv -id a -peers a=HOST:PORT,b=HOST:PORT,c=HOST:PORT -dir DATA
                        one node of a cluster of several processes

`

// run is main without the process: it returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(stderr, "kv: %v\nRun kv -h for help.\n", err)
		return 2
	}
	logger := slog.New(slog.DiscardHandler)
	if o.verbose || o.id != "" {
		logger = slog.New(slog.NewTextHandler(stderr, nil))
	}
	if o.id != "" {
		err = runNode(ctx, o, logger, stdout)
	} else {
		err = runDemo(ctx, o, logger, stdout)
	}
	if err != nil {
		fmt.Fprintf(stderr, "kv: %v\n", err)
		return 1
	}
	return 0
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("kv", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.Usage = func() {
		fmt.Fprint(stderr, usage)
		f.PrintDefaults()
	}
	f.StringVar(&o.dir, "dir", "", "keep the data in this `directory`")
	f.IntVar(&o.port, "port", 0, "three nodes: `port` of the page; the nodes, up to seven of them, take the 14 after it (default 8700 with -dir, otherwise free ports)")
	f.BoolVar(&o.verbose, "v", false, "three nodes: print what Raft does")
	f.BoolVar(&o.leases, "lease", false, "let reads with ?consistency=lease rely on clocks (Linux); without, they are linearizable ones")
	f.StringVar(&o.id, "id", "", "run one `node`, the one of this name in -peers")
	f.StringVar(&o.peers, "peers", "", "all nodes of the cluster, this one included, as `NAME=HOST:PORT,...`: where Raft listens; the same on every node")
	f.StringVar(&o.listen, "listen", "", "one node: `HOST:PORT` where Raft listens (default: this node's address in -peers)")
	f.StringVar(&o.http, "http", "127.0.0.1:0", "one node: `HOST:PORT` for clients and the page (port 0: a free one)")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return o, err
		}
		return o, errors.New("the command line is wrong, see above")
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("%q is not a flag; flags begin with -", f.Arg(0))
	}
	given := map[string]bool{}
	f.Visit(func(f *flag.Flag) { given[f.Name] = true })
	return o, o.check(given)
}

// check finds what is wrong with the combination of flags.
func (o *options) check(given map[string]bool) (err error) {
	if !given["id"] {
		for _, name := range []string{"peers", "listen", "http"} {
			if given[name] {
				return fmt.Errorf("-%s is for one node of a cluster of processes: say which one with -id NAME", name)
			}
		}
		if o.port == 0 && o.dir != "" {
			o.port = 8700
		}
		if last := 65535 - 2*maxNodes; o.port < 0 || o.port > last {
			return fmt.Errorf("-port %d: want 1 to %d", o.port, last)
		}
		return nil
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if given["port"] {
		bad("-port is for three nodes in one process: with -id use -http and -peers")
	}
	if o.dir == "" {
		bad("-dir is missing: a node needs a directory of its own that stays, for example -dir ./%s", o.id)
	}
	if o.members, err = parsePeers(o.peers); err != nil {
		bad("%w", err)
	}
	own := ""
	for _, m := range o.members {
		if string(m.ID) == o.id {
			own = m.Addr
		}
	}
	if own == "" && len(o.members) > 0 {
		bad("-id %q is not in -peers %s", o.id, o.peers)
	}
	if o.listen == "" {
		o.listen = own
	}
	for name, addr := range map[string]string{"-http": o.http, "-listen": o.listen} {
		if _, _, err := net.SplitHostPort(addr); err != nil && addr != "" {
			bad("%s %q: want HOST:PORT, for example 127.0.0.1:8701", name, addr)
		}
	}
	return errors.Join(errs...)
}

// parsePeers reads a=host:port,b=host:port. What it does not check, the
// library does: it names every bad member at once.
func parsePeers(s string) ([]raft.Member, error) {
	if s == "" {
		return nil, errors.New("-peers is missing: name all nodes, for example -peers a=127.0.0.1:8711,b=127.0.0.1:8712,c=127.0.0.1:8713")
	}
	var members []raft.Member
	for _, part := range strings.Split(s, ",") {
		id, addr, ok := strings.Cut(strings.TrimSpace(part), "=")
		if _, port, err := net.SplitHostPort(addr); !ok || id == "" || err != nil || port == "" || port == "0" {
			return nil, fmt.Errorf("-peers: %q is not NAME=HOST:PORT, for example a=127.0.0.1:8711", part)
		}
		members = append(members, raft.Member{ID: raft.NodeID(id), Addr: addr})
	}
	return members, nil
}

// runDemo runs three nodes and the page until ctx ends.
func runDemo(ctx context.Context, o options, logger *slog.Logger, stdout io.Writer) (err error) {
	kept := "they stay"
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "raft-kv-"); err != nil {
			return fmt.Errorf("making a directory for the data: %w; name one with -dir", err)
		}
		kept = "removed at the end"
		defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()
	}
	pageL, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", o.port))
	if err != nil {
		return fmt.Errorf("the page can't listen: %w\nIs another copy running? Stop it, or give this one other ports with -port", err)
	}
	defer pageL.Close()
	firstPort := 0
	if o.port != 0 {
		firstPort = o.port + 1
	}
	c, err := newCluster(o.dir, firstPort, o.leases, logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	began := time.Now()
	if err := c.Start(ctx); err != nil {
		return unlessStopped(ctx, err)
	}
	site := newHTTPServer(newPage(c, nil, true))
	served := make(chan struct{})
	go func() {
		defer close(served)
		site.Serve(pageL)
	}()
	defer func() { closeHTTP(site); <-served }()

	leader, term, err := c.WaitLeader(ctx)
	if err != nil {
		return unlessStopped(ctx, fmt.Errorf("no leader: %w", err))
	}
	took := time.Since(began)
	running := slices.DeleteFunc(c.Nodes(), func(n *Node) bool { _, _, running := n.current(); return !running })
	fmt.Fprintf(stdout, "%d nodes run in this process. Data: %s, %s.\n\n", len(running), o.dir, kept)
	fmt.Fprintf(stdout, "  leader  %s, elected in %.2f s (term %d)\n", leader.ID, took.Seconds(), term)
	fmt.Fprintf(stdout, "  page    http://%s/\n", pageL.Addr())
	fmt.Fprintf(stdout, "  write   curl -X PUT http://%s/kv/hello -d world\n", running[0].HTTP)
	fmt.Fprintf(stdout, "  read    curl http://%s/kv/hello\n\n", running[len(running)-1].HTTP)
	for _, n := range running {
		fmt.Fprintf(stdout, "  node %s  clients http://%s  raft %s\n", n.ID, n.HTTP, n.Listen)
	}
	fmt.Fprintf(stdout, "\nCtrl-C stops them.\n")
	<-ctx.Done()
	return nil
}

// runNode runs one node until ctx ends or the node fails.
func runNode(ctx context.Context, o options, logger *slog.Logger, stdout io.Writer) (err error) {
	c := &Cluster{Feed: newFeed()}
	n := &Node{
		ID: raft.NodeID(o.id), Dir: o.dir, Members: o.members, Listen: o.listen, HTTP: o.http, Leases: o.leases,
		Timeout: requestTimeout, Logger: logger, Feed: c.Feed, gate: newGate(),
		Handler: func(n *Node) http.Handler { return newPage(c, n, false) },
	}
	for _, m := range o.members {
		if m.ID == n.ID {
			n.Addr = m.Addr
		}
	}
	c.nodes = []*Node{n}
	began := time.Now()
	if err := n.Start(ctx); err != nil {
		return unlessStopped(ctx, err)
	}
	defer func() { err = errors.Join(err, n.Stop(true)) }()
	fmt.Fprintf(stdout, "node %s runs. Data: %s.\n", n.ID, n.Dir)
	fmt.Fprintf(stdout, "  page    http://%s/\n", n.HTTP)
	fmt.Fprintf(stdout, "  write   curl -X PUT http://%s/kv/hello -d world\n", n.HTTP)
	server, _, _ := n.current()
	for e := range server.Events(ctx) {
		leader := e.Peer
		if e.Kind == raft.EventElected {
			leader = n.ID
		} else if e.Kind != raft.EventLeader {
			continue
		}
		fmt.Fprintf(stdout, "  leader  %s, after %.2f s (term %d)\n", leader, time.Since(began).Seconds(), e.Term)
		break
	}
	select {
	case <-ctx.Done():
		return nil
	case <-server.Done():
		return server.Err()
	}
}

// unlessStopped returns nil if the user stopped the program before it was up.
func unlessStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
