package raft

import (
	"errors"
	flags "flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var rewriteScripts = flags.Bool("rewrite", false, "write what TestScripts sees into testdata/scripts, to be read before it is committed")

// TestScripts performs testdata/scripts/*.txt and compares what happens with
// what is written there. The README beside them explains the language.
func TestScripts(t *testing.T) {
	paths, err := filepath.Glob("testdata/scripts/*.txt")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			got := (&script{t: t, path: path}).perform(string(b))
			if *rewriteScripts {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			compareScripts(t, path, string(b), got)
		})
	}
}

func compareScripts(t *testing.T, path, want, got string) {
	t.Helper()
	if want == got {
		return
	}
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	i := 0
	for i < len(w) && i < len(g) && w[i] == g[i] {
		i++
	}
	from := max(0, i-4)
	t.Errorf("%s:%d: something else happens.\nwant:\n%s\n\nhave:\n%s\n\n(go test -run TestScripts -rewrite accepts it)", path, i+1,
		strings.Join(w[from:min(i+6, len(w))], "\n"), strings.Join(g[from:min(i+6, len(g))], "\n"))
}

// script interprets one file.
type script struct {
	t    *testing.T
	path string
	tc   *testCluster
}

const scriptIndent = "    "

// perform executes a script and returns it with what happened in the place of
// what was written.
func (s *script) perform(text string) string {
	var out strings.Builder
	for i, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if strings.HasPrefix(line, " ") {
			continue // what should happen
		}
		out.WriteString(line + "\n")
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.Fields(line)
		if s.tc == nil && f[0] != "cluster" {
			s.t.Fatalf("%s:%d: a script begins with: cluster NAME...", s.path, i+1)
		}
		if s.tc != nil {
			s.tc.trace.Reset()
		}
		if err := s.command(f[0], f[1:]); err != nil {
			s.t.Fatalf("%s:%d: %s: %v", s.path, i+1, line, err)
		}
		for happened := range strings.Lines(s.tc.trace.String()) {
			out.WriteString(scriptIndent + happened)
		}
	}
	return out.String()
}

func (s *script) command(verb string, args []string) (err error) {
	defer func() {
		if r := recover(); r != nil {
			bad, ok := r.(badScript)
			if !ok {
				panic(r)
			}
			err = bad
		}
	}()
	tc := s.tc
	switch verb {
	case "cluster":
		s.cluster(args)
	case "disk":
		s.disk(args)
	case "show":
		nodes := tc.nodes
		if len(args) > 0 {
			nodes = s.nodes(args)
		}
		tc.trace.WriteString(tc.table(nodes))
	case "network":
		for _, m := range tc.net {
			tc.say("%s", tc.describe(m))
		}
	case "progress":
		s.progress(s.node(args, 0))
	case "wait":
		d, err := time.ParseDuration(s.arg(args, 0))
		if err != nil {
			return err
		}
		tc.now = tc.now.Add(d)
	case "timeout":
		tc.timeout(s.node(args, 0))
	case "elect":
		s.quietly("AppendEntries", func() string { tc.elect(s.node(args, 0)); return "" })
	case "heartbeat":
		tc.step(s.node(args, 0), (*core).heartbeat)
	case "propose":
		for _, data := range args[1:] {
			tc.propose(s.node(args, 0), data)
		}
	case "deliver", "drop", "repeat":
		s.messages(verb, args)
	case "break":
		from, to := s.pair(args)
		tc.breakConnection(from, to)
	case "cut":
		s.cut(args)
	case "heal":
		tc.cuts = nil
	case "settle":
		s.quietly("", func() string { return fmt.Sprintf("(messages: %d)", tc.settle()) })
	case "run":
		d, err := time.ParseDuration(s.arg(args, 0))
		if err != nil {
			return err
		}
		s.quietly("", func() string { tc.run(d); return "" })
	default:
		return s.serverCommand(verb, s.node(args, 0))
	}
	return nil
}

// serverCommand is what befalls a process or its disk.
func (s *script) serverCommand(verb string, n *testNode) error {
	switch verb {
	case "crash":
		s.tc.crash(n)
	case "restart":
		if n.core != nil {
			s.tc.crash(n)
		}
		s.tc.boot(n)
	case "slow":
		n.slow = true
	case "flush":
		s.tc.flush(n)
	default:
		return errors.New("no such command")
	}
	return nil
}

// badScript says what is wrong with a line of a script.
type badScript struct{ error }

func bad(format string, args ...any) { panic(badScript{fmt.Errorf(format, args...)}) }

func (s *script) arg(args []string, i int) string {
	if i >= len(args) {
		bad("something is missing at the end")
	}
	return args[i]
}

func (s *script) node(args []string, i int) *testNode {
	name := s.arg(args, i)
	for _, n := range s.tc.nodes {
		if n.name == name {
			return n
		}
	}
	bad("no node is called %q", name)
	return nil
}

func (s *script) nodes(args []string) (out []*testNode) {
	for i := range args {
		out = append(out, s.node(args, i))
	}
	return out
}

// pair reads a->b.
func (s *script) pair(args []string) (from, to memberID) {
	a, b, ok := strings.Cut(s.arg(args, 0), "->")
	if !ok {
		bad("want FROM->TO")
	}
	return s.node([]string{a}, 0).id, s.node([]string{b}, 0).id
}

// cluster: NAME... [with OPTION...]: prevote; plain, without check-quorum; single, one
// entry per AppendEntries
func (s *script) cluster(args []string) {
	names, options := args, []string(nil)
	if i := slices.Index(args, "with"); i >= 0 {
		names, options = args[:i], args[i+1:]
	}
	s.tc = newTestCluster(s.t, names...)
	for _, option := range options {
		for _, n := range s.tc.nodes {
			switch option {
			case "prevote":
				n.limits.preVote = true
			case "single":
				n.limits.maxFrameBytes = 1
			case "plain":
				n.limits.preVote, n.limits.checkQuorum = false, false
			default:
				bad("unknown option %q", option)
			}
			n.core.limits = n.limits
		}
	}
}

// disk: NAME [term T] [vote NAME] log TERM...
func (s *script) disk(args []string) {
	n := s.node(args, 0)
	var hard HardState
	rest := args[1:]
	for len(rest) >= 2 && rest[0] != "log" {
		switch rest[0] {
		case "term":
			hard.Term = s.term(rest[1])
		case "vote":
			hard.VotedFor = uint64(s.node(rest, 1).id)
		default:
			bad("want term, vote or log, have %q", rest[0])
		}
		rest = rest[2:]
	}
	var terms []Term
	for _, t := range rest[min(1, len(rest)):] {
		terms = append(terms, s.term(t))
		hard.Term = max(hard.Term, terms[len(terms)-1])
	}
	n.core = nil
	s.tc.install(n, hard, terms...)
}

func (s *script) term(word string) Term {
	t, err := strconv.ParseUint(word, 10, 64)
	if err != nil {
		bad("want a term, have %q", word)
	}
	return Term(t)
}

// messages: FROM->TO [all|last|N]: the oldest one unless said otherwise.
func (s *script) messages(verb string, args []string) {
	from, to := s.pair(args)
	chosen := s.tc.between(from, to)
	if len(chosen) == 0 {
		bad("nothing is under way there")
	}
	which := "1"
	if len(args) > 1 {
		which = args[1]
	}
	switch n, err := strconv.Atoi(which); {
	case which == "all":
	case which == "last":
		chosen = chosen[len(chosen)-1:]
	case err == nil && n >= 1 && n <= len(chosen):
		chosen = chosen[n-1 : n]
	default:
		bad("want all, last or 1 to %d", len(chosen))
	}
	for _, m := range chosen {
		if verb != "repeat" {
			s.tc.take(m)
		}
		if verb != "drop" {
			s.tc.deliver(m)
		}
	}
}

// cut: A->B cuts one direction, A B... separates each of these nodes from each
// other, A B | C D... separates groups.
func (s *script) cut(args []string) {
	if strings.Contains(s.arg(args, 0), "->") {
		for i := range args {
			s.tc.cut(s.pair(args[i:]))
		}
		return
	}
	groups := [][]*testNode{{}}
	byBar := slices.Contains(args, "|")
	for i, word := range args {
		if word == "|" || i > 0 && !byBar {
			groups = append(groups, nil)
		}
		if word != "|" {
			last := len(groups) - 1
			groups[last] = append(groups[last], s.node(args, i))
		}
	}
	for i, g := range groups {
		for j, h := range groups {
			for _, a := range g {
				for _, b := range h {
					if i != j {
						s.tc.cut(a.id, b.id)
					}
				}
			}
		}
	}
}

// quietly leaves the messages out of what is written down, but for those of a kind.
func (s *script) quietly(but string, f func() string) {
	said := f()
	all := s.tc.trace.String()
	s.tc.trace.Reset()
	for line := range strings.Lines(all) {
		message := strings.Contains(line, " -> ") || strings.HasSuffix(line, downSuffix+"\n")
		if !message || but != "" && strings.Contains(line, but) {
			s.tc.trace.WriteString(line)
		}
	}
	if said != "" {
		s.tc.say("%s", said)
	}
}

// progress shows what a leader knows of its followers.
func (s *script) progress(n *testNode) {
	for _, p := range n.core.progress {
		state := "probing"
		if p.state == streaming {
			state = "streaming"
		}
		s.tc.say("%s  match %d, next %d, %s, %d under way", s.tc.name(p.id), p.match, p.next, state, len(p.inflight))
	}
}
