package raft

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// This file holds the rules of docs/DESIGN.md, "Rules that a test enforces",
// as failing tests. Each says what to do when it fails.

// coreFiles hold the algorithm and what it is made of: no lock, clock,
// goroutine, channel or I/O. The simulator runs exactly these.
var coreFiles = []string{
	"change.go", "core.go", "election.go", "entry.go", "errors.go", "event.go", "health.go", "invariants.go", "lease.go", "log.go", "membership.go", "message.go", "outbox.go", "pending.go", "progress.go", "quorum.go", "readindex.go", "replication.go", "session.go", "snapshot.go", "transfer.go",
}

// coreImports are all that core files may import. Of the packages with a list,
// only these names may be used: of time the types and arithmetic, of
// math/rand/v2 the source that is handed in and never the global one.
var coreImports = map[string][]string{
	"encoding/binary": nil,
	"errors":          nil,
	"fmt":             {"Errorf", "Sprintf"},
	"hash/crc32":      {"Update", "MakeTable", "Castagnoli"},
	"math/bits":       {"Mul64"},
	"math/rand/v2":    {"Rand"},
	"slices":          nil,
	"strings":         {"Cut", "Join"},
	"sort":            {"Search"},
	"time":            {"Time", "Duration", "Millisecond", "Minute", "Unix"},
}

// startedGoroutines are all places of this package and of internal/ at which a
// goroutine begins; see the table in docs/DESIGN.md, "Goroutines". Those of
// package raft begin in (*ConsensusModule).start, given a function here.
var startedGoroutines = []string{
	"capture.go: (*applier).capture starts a.runCapture",
	"form.go: (*Server).startForming starts s.runForming",
	"install.go: (*Server).snapshot starts s.runSnapshot",
	"internal/wal/wal.go: Open starts l.runTend",
	"link.go: (*link).push starts l.run",
	"raft.go: (*ConsensusModule).run starts a.run",
	"raft.go: (*ConsensusModule).run starts cm.runFlusher",
	"raft.go: (*ConsensusModule).run starts cm.runTimer",
	"raft.go: (*ConsensusModule).runLeadership starts cm.runHeartbeats",
	"raft.go: (*ConsensusModule).start starts func",
	"serve.go: (*Server).runAccept starts s.serve",
	"server.go: (*Server).run starts s.runAccept",
}

// importDAG is which packages of the module each one may import, besides the
// standard library. Tests inside a package obey it too.
var importDAG = map[string][]string{
	"example.com/raft":                    {"example.com/raft/internal/wal", "example.com/raft/internal/snap", "example.com/raft/internal/vfs", "example.com/raft/internal/memnet", "example.com/raft/internal/timeline"},
	"example.com/raft/internal/wal":       {"example.com/raft/internal/vfs"},
	"example.com/raft/internal/snap":      {"example.com/raft/internal/vfs"},
	"example.com/raft/internal/memnet":    {},
	"example.com/raft/internal/timeline":  {},
	"example.com/raft/internal/vfs":       {},
	"example.com/raft/admin":              {"example.com/raft"},
	"example.com/raft/examples/operate":   {"example.com/raft"},
	"example.com/raft/examples/kv":        {"example.com/raft", "example.com/raft/internal/memnet", "example.com/raft/examples/kv/client"},
	"example.com/raft/examples/kv/client": {},
}

// testOnlyModules are what go.mod may require: tests use them, and nothing
// that an importer links.
var testOnlyModules = []string{"github.com/anishathalye/porcupine", "github.com/fortytw2/leaktest", "pgregory.net/rapid"}

var nestedModules = []string{"bench", "cmd/raftctl", "contrib", "e2e"}

// readOnlyGlobals are the package variables that are no errors and that nobody writes.
var readOnlyGlobals = []string{
	"codec.go: castagnoli", "entry.go: castagnoli", "errors.go: membershipReasons", "errors.go: sessionReasons", "errors.go: transferReasons", "internal/vfs/mem.go: opNames", "internal/vfs/memnode.go: zeroPage", "internal/snap/format.go: castagnoli",
	"internal/wal/format.go: castagnoli", "internal/wal/format.go: zeroBlock",
}

// repoFile is a parsed Go file of this repository; its path has slashes.
type repoFile struct {
	path string
	ast  *ast.File
	src  []byte
}

func (f *repoFile) test() bool { return strings.HasSuffix(f.path, "_test.go") }

// library tells whether importers can link the file: package raft and internal/.
func (f *repoFile) library() bool {
	return !f.test() && (!strings.Contains(f.path, "/") || strings.HasPrefix(f.path, "internal/"))
}

type repo struct {
	fset  *token.FileSet
	files []*repoFile
	docs  []string // paths of Markdown files
	info  *types.Info
	pkg   *types.Package
}

func readRepo(t *testing.T) *repo {
	r, err := parseRepo()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// parseRepo parses every Go file below the working directory, which is the
// repository's root, and resolves the names of package raft itself. Packages
// that it imports stay unknown, so this needs no compiled files and is fast.
var parseRepo = sync.OnceValues(func() (*repo, error) {
	r := &repo{fset: token.NewFileSet()}
	err := fs.WalkDir(os.DirFS("."), ".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && p != "." && (d.Name()[0] == '.' || d.Name() == "testdata"):
			return fs.SkipDir
		case strings.HasSuffix(p, ".md"):
			r.docs = append(r.docs, p)
		case strings.HasSuffix(p, ".go"):
			src, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			f, err := parser.ParseFile(r.fset, p, src, parser.ParseComments)
			if err != nil {
				return err
			}
			r.files = append(r.files, &repoFile{p, f, src})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	r.info = &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}}
	var own []*ast.File
	for _, f := range r.root() {
		if f.path != "race_off.go" { // the same names as race_on.go
			own = append(own, f.ast)
		}
	}
	conf := types.Config{Importer: emptyImporter{}, Error: func(error) {}}
	r.pkg, _ = conf.Check("raft", r.fset, own, r.info) // every use of an import is an error; they say nothing
	return r, nil
})

// emptyImporter gives packages without content.
type emptyImporter struct{}

func (emptyImporter) Import(p string) (*types.Package, error) {
	pkg := types.NewPackage(p, strings.TrimSuffix(path.Base(strings.TrimSuffix(p, "/v2")), "/"))
	pkg.MarkComplete()
	return pkg, nil
}

// root returns the non-test files of package raft.
func (r *repo) root() (fs []*repoFile) {
	for _, f := range r.files {
		if !f.test() && !strings.Contains(f.path, "/") {
			fs = append(fs, f)
		}
	}
	return fs
}

func (r *repo) core(t *testing.T) (fs []*repoFile) {
	for _, f := range r.root() {
		if slices.Contains(coreFiles, f.path) {
			fs = append(fs, f)
		}
	}
	if len(fs) != len(coreFiles) {
		t.Errorf("coreFiles lists %d files, %d exist", len(coreFiles), len(fs))
	}
	return fs
}

func (r *repo) at(n ast.Node) string {
	p := r.fset.Position(n.Pos())
	return fmt.Sprintf("%s:%d", p.Filename, p.Line)
}

// imported returns the path of the package that x names in f, "" if it names none.
func imported(f *repoFile, x ast.Expr) string {
	id, ok := x.(*ast.Ident)
	if !ok {
		return ""
	}
	for _, im := range f.ast.Imports {
		p := strings.Trim(im.Path.Value, `"`)
		name := path.Base(strings.TrimSuffix(p, "/v2"))
		if im.Name != nil {
			name = im.Name.Name
		}
		if name == id.Name {
			return p
		}
	}
	return ""
}

// funcName returns "Name" or "(*Receiver).Name".
func funcName(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return d.Name.Name
	}
	return "(" + receiver(d) + ")." + d.Name.Name
}

func receiver(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return ""
	}
	typ, star := d.Recv.List[0].Type, ""
	if s, ok := typ.(*ast.StarExpr); ok {
		typ, star = s.X, "*"
	}
	if g, ok := typ.(*ast.IndexExpr); ok {
		typ = g.X
	}
	return star + typ.(*ast.Ident).Name
}

// funcs calls visit with every function declared in f.
func (f *repoFile) funcs(visit func(*ast.FuncDecl)) {
	for _, d := range f.ast.Decls {
		if fd, ok := d.(*ast.FuncDecl); ok {
			visit(fd)
		}
	}
}

// TestTidyUnlock: ConsensusModule.mu is released by unlock, which looks at what
// was queued meanwhile: whoever found it held relies on that.
func TestTidyUnlock(t *testing.T) {
	r := readRepo(t)
	for _, f := range r.root() {
		f.funcs(func(d *ast.FuncDecl) {
			ast.Inspect(d, func(n ast.Node) bool {
				s, ok := n.(*ast.SelectorExpr)
				if !ok || s.Sel.Name != "Unlock" || funcName(d) == "(*ConsensusModule).unlock" {
					return true
				}
				mu, ok := s.X.(*ast.SelectorExpr)
				if ok && mu.Sel.Name == "mu" && strings.HasSuffix(r.info.TypeOf(mu.X).String(), ".ConsensusModule") {
					t.Errorf("%s: want unlock in place of mu.Unlock, so that no proposal or read stays in its queue", r.at(n))
				}
				return true
			})
		})
	}
}

// TestTidyCoreImports: core files import the whitelist, and of each package
// use only what has no clock, no global dice, no I/O.
func TestTidyCoreImports(t *testing.T) {
	r := readRepo(t)
	for _, f := range r.core(t) {
		for _, im := range f.ast.Imports {
			p := strings.Trim(im.Path.Value, `"`)
			if _, ok := coreImports[p]; !ok {
				t.Errorf("%s imports %s: the algorithm has no lock, clock, goroutine or I/O; do this in a file around it", r.at(im), p)
			}
			if im.Name != nil {
				t.Errorf("%s renames an import", r.at(im))
			}
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.SelectorExpr:
				names := coreImports[imported(f, n.X)]
				if names != nil && !slices.Contains(names, n.Sel.Name) {
					t.Errorf("%s uses %s.%s: want one of %v", r.at(n), n.X, n.Sel.Name, names)
				}
			case *ast.GoStmt, *ast.SelectStmt, *ast.SendStmt:
				t.Errorf("%s: goroutines, select and send are not for the algorithm", r.at(n))
			case *ast.UnaryExpr:
				if n.Op == token.ARROW {
					t.Errorf("%s receives from a channel: the algorithm waits for nothing", r.at(n))
				}
			case *ast.ChanType:
				if f.path != "pending.go" { // it keeps the channels of those who wait, and closes none
					t.Errorf("%s: a channel in the algorithm", r.at(n))
				}
			}
			return true
		})
	}
}

// TestTidyCoreCalls: a core file calls no function of a file around it, where
// a lock or a clock could hide.
func TestTidyCoreCalls(t *testing.T) {
	r := readRepo(t)
	for _, f := range r.core(t) {
		ast.Inspect(f.ast, func(n ast.Node) bool {
			id, ok := n.(*ast.Ident)
			if !ok {
				return true
			}
			fn, ok := r.info.Uses[id].(*types.Func)
			if !ok || fn.Pkg() != r.pkg {
				return true
			}
			where := r.fset.Position(fn.Pos()).Filename
			if where != "" && !slices.Contains(coreFiles, where) {
				t.Errorf("%s calls %s of %s, which is not a core file", r.at(id), fn.Name(), where)
			}
			return true
		})
	}
}

// TestTidyNoMapIteration: core files iterate over no map, whose order is
// random: the same seed must give the same run.
func TestTidyNoMapIteration(t *testing.T) {
	r := readRepo(t)
	ranges := 0
	for _, f := range r.core(t) {
		ast.Inspect(f.ast, func(n ast.Node) bool {
			rs, ok := n.(*ast.RangeStmt)
			if !ok {
				return true
			}
			ranges++
			typ := r.info.Types[rs.X].Type
			if typ == nil || typ == types.Typ[types.Invalid] {
				t.Errorf("%s: this test can't tell the type that is iterated over; use a slice of this package", r.at(rs))
				return true
			}
			if _, isMap := typ.Underlying().(*types.Map); isMap {
				t.Errorf("%s iterates over a map; keep a sorted slice", r.at(rs))
			}
			return true
		})
	}
	if ranges < 10 {
		t.Errorf("found only %d range loops in the core files: this test is blind", ranges)
	}
}

// TestTidyGoroutines: goroutines begin in the listed places only, so that
// Close can join all of them.
func TestTidyGoroutines(t *testing.T) {
	r := readRepo(t)
	var found []string
	for _, f := range r.files {
		if !f.library() || f.path == "testharness.go" { // the harness checks itself that nothing is left
			continue
		}
		f.funcs(func(d *ast.FuncDecl) {
			note := func(what ast.Expr) {
				found = append(found, fmt.Sprintf("%s: %s starts %s", f.path, funcName(d), r.started(what)))
			}
			ast.Inspect(d, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.GoStmt:
					note(n.Call.Fun)
				case *ast.CallExpr:
					s, ok := n.Fun.(*ast.SelectorExpr)
					if !ok {
						break
					}
					if from := imported(f, s.X); s.Sel.Name == "AfterFunc" && (from == "time" || from == "context") {
						t.Errorf("%s: AfterFunc starts a goroutine that nobody joins", r.at(n))
					}
					fn, ok := r.info.Uses[s.Sel].(*types.Func)
					if ok && fn.Name() == "start" && strings.HasSuffix(fn.Type().(*types.Signature).Recv().Type().String(), ".ConsensusModule") {
						note(n.Args[0])
					}
				}
				return true
			})
		})
	}
	slices.Sort(found)
	if !slices.Equal(found, startedGoroutines) {
		t.Errorf("goroutines begin at\n\t%s\nand not, as listed, at\n\t%s\nChange startedGoroutines and the table in docs/DESIGN.md, and say there who stops the new one",
			strings.Join(found, "\n\t"), strings.Join(startedGoroutines, "\n\t"))
	}
}

// started names the function that a goroutine runs. One that only calls
// another goes by that one's name.
func (r *repo) started(x ast.Expr) string {
	switch x := x.(type) {
	case *ast.FuncLit:
		if len(x.Body.List) == 1 {
			if s, ok := x.Body.List[0].(*ast.ExprStmt); ok {
				return r.started(s.X.(*ast.CallExpr).Fun)
			}
		}
		return "func"
	case *ast.SelectorExpr:
		return r.started(x.X) + "." + x.Sel.Name
	case *ast.Ident:
		return x.Name
	}
	return "?"
}

const longest = 70 // lines

// TestTidyFunctionLength: a longer function says why right above.
func TestTidyFunctionLength(t *testing.T) {
	r := readRepo(t)
	for _, f := range r.files {
		f.funcs(func(d *ast.FuncDecl) {
			lines := r.fset.Position(d.End()).Line - r.fset.Position(d.Pos()).Line + 1
			if lines > longest && !strings.Contains(d.Doc.Text(), "More than 70 lines") {
				t.Errorf("%s: %s has %d lines; cut it, or end its comment with \"More than 70 lines: \" and the reason", r.at(d), funcName(d), lines)
			}
		})
	}
}

// stateRule looks for writes of term, vote and log.
type stateRule struct {
	r       *repo
	guarded map[types.Object]bool // core.currentTerm, core.votedFor, core.log, and all of raftLog
	coreLog types.Object
	writes  int
}

// stateReaders are raftLog's methods that change nothing.
var stateReaders = []string{"firstInMemory", "from", "lastID", "matches", "term"}

// TestTidyStateIsWrittenByCore: term, vote and log change only in methods of
// *core and *raftLog, and in what makes these two. Nobody else takes their
// addresses or calls what changes them.
func TestTidyStateIsWrittenByCore(t *testing.T) {
	s := stateRule{r: readRepo(t), guarded: map[types.Object]bool{}}
	fields := func(typ string) *types.Struct {
		return s.r.pkg.Scope().Lookup(typ).Type().Underlying().(*types.Struct)
	}
	for f := range fields("core").Fields() {
		switch f.Name() {
		case "log":
			s.coreLog = f
			fallthrough
		case "currentTerm", "votedFor":
			s.guarded[f] = true
		}
	}
	for f := range fields("raftLog").Fields() {
		s.guarded[f] = true
	}
	if len(s.guarded) < 8 || s.coreLog == nil {
		t.Fatalf("found only %d fields to guard: this test is blind", len(s.guarded))
	}
	for _, f := range s.r.root() {
		f.funcs(func(d *ast.FuncDecl) { s.check(t, d) })
	}
	if s.writes < 10 {
		t.Errorf("found only %d writes of term, vote and log: this test is blind", s.writes)
	}
}

func (s *stateRule) check(t *testing.T, d *ast.FuncDecl) {
	own := slices.Contains([]string{"*core", "*raftLog"}, receiver(d)) || slices.Contains([]string{"newCore", "newRaftLog"}, funcName(d))
	write := func(x ast.Expr) {
		if !s.within(x) {
			return
		}
		if s.writes++; !own {
			t.Errorf("%s: %s writes the persistent state, which only methods of *core and *raftLog may", s.r.at(x), funcName(d))
		}
	}
	ast.Inspect(d, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			if n.Tok != token.DEFINE {
				for _, x := range n.Lhs {
					write(x)
				}
			}
		case *ast.IncDecStmt:
			write(n.X)
		case *ast.UnaryExpr:
			if n.Op == token.AND && !own && s.within(n.X) {
				t.Errorf("%s: %s takes the address of the persistent state", s.r.at(n), funcName(d))
			}
		case *ast.CallExpr:
			method, ok := n.Fun.(*ast.SelectorExpr)
			if !ok || own || slices.Contains(stateReaders, method.Sel.Name) {
				break
			}
			if on, ok := method.X.(*ast.SelectorExpr); ok && s.r.info.Uses[on.Sel] == s.coreLog {
				t.Errorf("%s: %s calls %s on the core's log; from outside only these may be called: %v", s.r.at(n), funcName(d), method.Sel.Name, stateReaders)
			}
		}
		return true
	})
}

// within tells whether x is a guarded field or a part of one.
func (s *stateRule) within(x ast.Expr) bool {
	for {
		switch e := x.(type) {
		case *ast.SelectorExpr:
			if s.guarded[s.r.info.Uses[e.Sel]] {
				return true
			}
			x = e.X
		case *ast.IndexExpr:
			x = e.X
		case *ast.ParenExpr:
			x = e.X
		case *ast.StarExpr:
			x = e.X
		default:
			return false
		}
	}
}

// TestTidyNoSleep: the library never sleeps, and tests do in virtual time only:
// within a function that is given to a bubble of testing/synctest, directly or
// by a helper, or in a helper whose comment says "in virtual time".
func TestTidyNoSleep(t *testing.T) {
	r := readRepo(t)
	for dir, files := range r.byDir() {
		bubbles := bubbleHelpers(files)
		for _, f := range files {
			if !f.library() && !f.test() || strings.HasPrefix(f.path, "bench/") {
				continue
			}
			r.sleeps(t, dir, f, bubbles)
		}
	}
}

// bubbleHelpers returns the functions that call synctest.Test, or one that does.
func bubbleHelpers(files []*repoFile) (names []string) {
	for before := -1; before < len(names); {
		before = len(names)
		for _, f := range files {
			f.funcs(func(d *ast.FuncDecl) {
				if !slices.Contains(names, d.Name.Name) && calls(d, func(fun ast.Expr) bool { return f.inBubble(fun, names) }) {
					names = append(names, d.Name.Name)
				}
			})
		}
	}
	return names
}

// inBubble tells whether a call of fun runs its argument in a bubble.
func (f *repoFile) inBubble(fun ast.Expr, helpers []string) bool {
	switch fun := fun.(type) {
	case *ast.Ident:
		return slices.Contains(helpers, fun.Name)
	case *ast.SelectorExpr:
		return fun.Sel.Name == "Test" && imported(f, fun.X) == "testing/synctest"
	}
	return false
}

func (r *repo) sleeps(t *testing.T, dir string, f *repoFile, bubbles []string) {
	var stack []ast.Node
	ast.Inspect(f.ast, func(n ast.Node) bool {
		if n == nil {
			stack = stack[:len(stack)-1]
			return true
		}
		stack = append(stack, n)
		s, ok := n.(*ast.SelectorExpr)
		if !ok || s.Sel.Name != "Sleep" || imported(f, s.X) != "time" {
			return true
		}
		for _, up := range stack[:len(stack)-1] {
			if d, ok := up.(*ast.FuncDecl); ok && f.test() && strings.Contains(d.Doc.Text(), "in virtual time") {
				return true
			}
			if call, ok := up.(*ast.CallExpr); ok && f.inBubble(call.Fun, bubbles) {
				return true // within a function that it is given
			}
		}
		t.Errorf("%s (in %s) sleeps outside a bubble of testing/synctest; wait for a channel, or use virtual time", r.at(n), dir)
		return true
	})
}

// calls tells whether d calls a function that is wanted.
func calls(d *ast.FuncDecl, wanted func(fun ast.Expr) bool) (yes bool) {
	ast.Inspect(d, func(n ast.Node) bool {
		if c, ok := n.(*ast.CallExpr); ok && wanted(c.Fun) {
			yes = true
		}
		return true
	})
	return yes
}

func (r *repo) byDir() map[string][]*repoFile {
	dirs := map[string][]*repoFile{}
	for _, f := range r.files {
		dirs[path.Dir(f.path)] = append(dirs[path.Dir(f.path)], f)
	}
	return dirs
}

// TestTidyNoHiddenEnds: nothing runs before main, and nothing but a main
// package ends the process.
func TestTidyNoHiddenEnds(t *testing.T) {
	r := readRepo(t)
	for _, f := range r.files {
		f.funcs(func(d *ast.FuncDecl) {
			if d.Recv == nil && d.Name.Name == "init" {
				t.Errorf("%s: init runs in every program that imports this; do it where it is needed", r.at(d))
			}
		})
		if f.ast.Name.Name == "main" || f.test() {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			switch from := imported(f, s.X); {
			case from == "os" && s.Sel.Name == "Exit", from == "log":
				t.Errorf("%s uses %s.%s: return an error; Config.Logger is where a library logs", r.at(n), s.X, s.Sel.Name)
			}
			return true
		})
	}
}

// TestTidyNoGlobalState: package variables of the library are errors, or never
// written and listed.
func TestTidyNoGlobalState(t *testing.T) {
	r := readRepo(t)
	for _, f := range r.files {
		if !f.library() {
			continue
		}
		for _, d := range f.ast.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, s := range g.Specs {
				v := s.(*ast.ValueSpec)
				for i, name := range v.Names {
					if name.Name == "_" || slices.Contains(readOnlyGlobals, f.path+": "+name.Name) {
						continue
					}
					if i < len(v.Values) && isErrorsNew(f, v.Values[i]) {
						continue
					}
					t.Errorf("%s: package variable %s: two nodes in one process would share it; if it is never written, add it to readOnlyGlobals", r.at(v), name.Name)
				}
			}
		}
	}
}

func isErrorsNew(f *repoFile, x ast.Expr) bool {
	c, ok := x.(*ast.CallExpr)
	if !ok {
		return false
	}
	s, ok := c.Fun.(*ast.SelectorExpr)
	return ok && s.Sel.Name == "New" && imported(f, s.X) == "errors"
}

// undocumented are methods whose meaning everybody knows.
var undocumented = []string{"Error", "Is", "String", "Unwrap"}

// TestTidyDocComments: every exported name of package raft is documented.
func TestTidyDocComments(t *testing.T) {
	r := readRepo(t)
	n := 0
	missing := func(at ast.Node, name string, docs ...*ast.CommentGroup) {
		n++
		for _, d := range docs {
			if strings.TrimSpace(d.Text()) != "" {
				return
			}
		}
		t.Errorf("%s: %s has no doc comment: say what it is, its units, its errors, and who may call it when", r.at(at), name)
	}
	for _, f := range r.root() {
		for _, d := range f.ast.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.IsExported() && (d.Recv == nil || ast.IsExported(strings.TrimPrefix(receiver(d), "*"))) &&
					!slices.Contains(undocumented, d.Name.Name) {
					missing(d, funcName(d), d.Doc)
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.TypeSpec:
						if s.Name.IsExported() {
							missing(s, s.Name.Name, d.Doc, s.Doc)
						}
					case *ast.ValueSpec:
						for _, name := range s.Names {
							if name.IsExported() {
								missing(s, name.Name, d.Doc, s.Doc, s.Comment)
							}
						}
					}
				}
			}
		}
	}
	if n < 50 {
		t.Errorf("found only %d exported names: this test is blind", n)
	}
}

// goList runs go list and returns its lines.
func goList(t *testing.T, args ...string) []string {
	var stderr bytes.Buffer
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %s: %v\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// TestTidyDependencies: an importer links this module and the standard
// library, without its testing packages.
func TestTidyDependencies(t *testing.T) {
	lines := goList(t, "-deps", "-f", "{{.Standard}} {{.ImportPath}}", ".")
	if len(lines) < 50 {
		t.Fatalf("go list found only %d packages: this test is blind", len(lines))
	}
	for _, line := range lines {
		standard, p, _ := strings.Cut(line, " ")
		if standard != "true" && p != "example.com/raft" && !strings.HasPrefix(p, "example.com/raft/internal/") {
			t.Errorf("package raft reaches %s: the library has no run-time dependency but the standard library", p)
		}
		if p == "testing" || strings.HasPrefix(p, "testing/") {
			t.Errorf("package raft reaches %s: the harness takes an interface", p)
		}
	}
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^(?:require)?\s+(\S+) v\S+`).FindAllSubmatch(mod, -1) {
		if !slices.Contains(testOnlyModules, string(m[1])) {
			t.Errorf("go.mod requires %s: tests may use %v, everything else goes into a nested module", m[1], testOnlyModules)
		}
	}
}

// TestTidyImportDAG: packages of this module import each other in the
// direction that docs/DESIGN.md gives, tests included.
func TestTidyImportDAG(t *testing.T) {
	for _, line := range goList(t, "-f", `{{.ImportPath}} {{join .Imports " "}} {{join .TestImports " "}} {{join .XTestImports " "}}`, "./...") {
		f := strings.Fields(line)
		allowed, known := importDAG[f[0]]
		if !known {
			t.Errorf("%s is not in importDAG: say there, and in docs/DESIGN.md, what it may import", f[0])
		}
		for _, p := range f[1:] {
			if strings.HasPrefix(p, "example.com/raft") && p != f[0] && !slices.Contains(allowed, p) {
				t.Errorf("%s imports %s: allowed are %v", f[0], p, allowed)
			}
		}
	}
	mods, err := filepath.Glob("*/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	more, _ := filepath.Glob("*/*/go.mod") // the pattern is valid
	for _, m := range append(mods, more...) {
		if dir := filepath.ToSlash(filepath.Dir(m)); !slices.Contains(nestedModules, dir) {
			t.Errorf("%s is a nested module; there are at most these four: %v", dir, nestedModules)
		}
	}
}

// TestTidyLayout: the list of files in docs/DESIGN.md is the list of files,
// and its table of goroutines that of startedGoroutines.
func TestTidyLayout(t *testing.T) {
	r := readRepo(t)
	design, err := os.ReadFile("docs/DESIGN.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^([a-z_]+\.go)  `).FindAllSubmatch(design, -1) {
		listed[string(m[1])] = true
	}
	for _, f := range r.root() {
		if !listed[f.path] {
			t.Errorf("docs/DESIGN.md has no line for %s in its layout", f.path)
		}
		delete(listed, f.path)
	}
	for f := range listed {
		t.Errorf("docs/DESIGN.md lists %s, which does not exist", f)
	}
	for _, g := range startedGoroutines {
		_, what, _ := strings.Cut(g, " starts ")
		if what == "func" {
			continue // start itself
		}
		name := what[strings.LastIndex(what, ".")+1:]
		if what == "a.run" {
			name = "applier.run"
		} else if what == "l.run" {
			name = "link.run"
		}
		if !bytes.Contains(design, []byte("| `"+name+"` |")) {
			t.Errorf("docs/DESIGN.md has no row `%s` in its table of goroutines", name)
		}
	}
}

// TestTidyLinks: links in Markdown files lead to files and headings that exist.
func TestTidyLinks(t *testing.T) {
	r := readRepo(t)
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	n := 0
	for _, doc := range r.docs {
		text := readText(t, doc)
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			n++
			file, anchor, _ := strings.Cut(m[1], "#")
			target := doc
			if file != "" {
				target = path.Join(path.Dir(doc), file)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", doc, m[1], err)
			} else if anchor != "" && !slices.Contains(anchors(readText(t, target)), anchor) {
				t.Errorf("%s links to %s, but no heading of %s gives that anchor", doc, m[1], target)
			}
		}
	}
	if n < 10 {
		t.Errorf("found only %d links: this test is blind", n)
	}
}

func readText(t *testing.T, p string) string {
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// anchors returns the anchors of a Markdown text's headings.
func anchors(text string) (out []string) {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.+)$`).FindAllStringSubmatch(text, -1) {
		a := strings.ToLower(m[1])
		a = regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(a, "")
		out = append(out, strings.ReplaceAll(a, " ", "-"))
	}
	return out
}

// fenced returns the contents of a text's fenced blocks of one language.
func fenced(text, language string) (blocks []string) {
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// TestTidyReadmeCommands: .ci/run runs every command of README, so a command
// that does not work fails there; and what a command names exists.
func TestTidyReadmeCommands(t *testing.T) {
	run := readText(t, ".ci/run")
	var commands []string
	for _, block := range fenced(readText(t, "README.md"), "sh") {
		for line := range strings.Lines(block) {
			line, _, _ = strings.Cut(line, "#")
			if line = strings.TrimSpace(line); line != "" {
				commands = append(commands, line)
			}
		}
	}
	for _, c := range commands {
		if !strings.Contains(run, c) {
			t.Errorf("README says %q, and .ci/run does not run it", c)
		}
		for _, p := range regexp.MustCompile(`\./([\w/]+)`).FindAllStringSubmatch(c, -1) {
			if _, err := os.Stat(p[1]); err != nil && !strings.Contains(p[1], "...") {
				t.Errorf("README says %q: %v", c, err)
			}
		}
	}
	if !slices.Contains(commands, "go test -race ./...") {
		t.Errorf("README has no command \"go test -race ./...\" among %q", commands)
	}
}

// TestTidyReadmeProgram: README's program is the package's Example, and at
// most a page long; package documentation shows the same.
func TestTidyReadmeProgram(t *testing.T) {
	blocks := fenced(readText(t, "README.md"), "go")
	if len(blocks) == 0 {
		t.Fatal("README shows no program")
	}
	head, body, ok := strings.Cut(blocks[0], "type counter ")
	if !ok || !strings.Contains(head, "package main") {
		t.Fatalf("README's first Go block is not the program:\n%s", blocks[0])
	}
	body = strings.TrimSuffix(strings.Replace("type counter "+body, "func main() {", "func Example() {", 1), "}\n")
	if !strings.Contains(readText(t, "example_test.go"), body) {
		t.Errorf("example_test.go does not hold README's program, with Example for main:\n%s", body)
	}
	if n := strings.Count(body, "\n"); n > 31 {
		t.Errorf("README's program has %d lines without its imports; 30 is the promise", n)
	}
	for _, more := range blocks[1:] {
		if !strings.Contains(readText(t, "example_test.go"), more) {
			t.Errorf("example_test.go does not hold what README shows:\n%s", more)
		}
	}
	var doc strings.Builder
	for line := range strings.Lines(blocks[0][strings.Index(blocks[0], "type counter "):]) {
		doc.WriteString(strings.TrimRight("\t"+line, "\n\t ") + "\n")
	}
	pkg := readRepo(t).packageDoc(t)
	if !strings.Contains(pkg, strings.TrimRight(doc.String(), "\n")) {
		t.Errorf("doc.go does not show README's program, indented by a tab:\n%s", doc.String())
	}
}

func (r *repo) packageDoc(t *testing.T) string {
	for _, f := range r.root() {
		if f.path == "doc.go" {
			return strings.TrimPrefix(strings.TrimSuffix(string(f.src), "*/\npackage raft\n"), "/*\n")
		}
	}
	t.Fatal("doc.go is missing")
	return ""
}

// TestTidyCIRun: the file is a script that stops at the first failure.
func TestTidyCIRun(t *testing.T) {
	st, err := os.Stat(".ci/run")
	if errors.Is(err, fs.ErrNotExist) || st.Mode()&0o111 == 0 {
		t.Fatalf(".ci/run is missing or not executable: %v", err)
	}
	text := readText(t, ".ci/run")
	if !strings.HasPrefix(text, "#!/usr/bin/env bash\n") || !strings.Contains(text, "\nset -euo pipefail\n") {
		t.Error(".ci/run must be bash with set -euo pipefail: a failing step must fail the run")
	}
}
