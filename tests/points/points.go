// Package points lists the crash points of a source tree, which are calls of crash.Point with a literal name: a list that is read from
// the source cannot miss one that nobody came by. It never runs anything.
package points

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A Point is a name and the places that have it.
type Point struct {
	Name   string
	Places []string // "daemon/pump.go:12"
}

// List returns the crash points below root, by name. A point whose name is no literal, or which no failure could be told by, is an error.
func List(root string) ([]Point, error) {
	byName := map[string]*Point{}
	files := token.NewFileSet()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "tests" || d.Name() == "bin"):
			return fs.SkipDir
		case d.IsDir(), !strings.HasSuffix(path, ".go"), strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		return collect(byName, files, root, file)
	})
	if err != nil {
		return nil, fmt.Errorf("list crash points: %w", err)
	}
	var all []Point
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		all = append(all, *byName[name])
	}
	return all, nil
}

func collect(byName map[string]*Point, files *token.FileSet, root string, file *ast.File) (err error) {
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok || err != nil {
			return err == nil
		}
		f, ok := call.Fun.(*ast.SelectorExpr)
		if !ok || f.Sel.Name != "Point" {
			return true
		}
		if pkg, ok := f.X.(*ast.Ident); !ok || pkg.Name != "crash" {
			return true
		}
		at := files.Position(call.Pos())
		if rel, relErr := filepath.Rel(root, at.Filename); relErr == nil {
			at.Filename = rel
		}
		place := fmt.Sprintf("%s:%d", at.Filename, at.Line)
		name, ok := literal(call)
		if !ok || strings.ContainsAny(name, ":,/ ") || strings.Count(name, ".") < 2 {
			err = fmt.Errorf("%s: want crash.Point(\"package.step.before-what\"), the name a literal without ':', ',', '/' or space", place)
			return false
		}
		if byName[name] == nil {
			byName[name] = &Point{Name: name}
		}
		byName[name].Places = append(byName[name].Places, place)
		return true
	})
	return err
}

func literal(call *ast.CallExpr) (string, bool) {
	if len(call.Args) != 1 {
		return "", false
	}
	lit, ok := call.Args[0].(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	name, err := strconv.Unquote(lit.Value)
	return name, err == nil
}
